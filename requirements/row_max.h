// llama.cpp takes the maximum of a row of attention scores one number after the other: a third of the time of attention over a prompt.
// The order of a maximum does not matter, so here sixteen are taken side by side, which compilers turn into vector instructions.
#include "vec.h"

#ifndef GGML_USE_ACCELERATE
static inline void lmweb_vec_max_f32(const int n, float * s, const float * x) {
    enum { LANES = 16 };
    float most[LANES];
    for (int j = 0; j < LANES; ++j) {
        most[j] = -INFINITY;
    }
    int i = 0;
    for (; i + LANES <= n; i += LANES) {
        for (int j = 0; j < LANES; ++j) {
            most[j] = x[i + j] > most[j] ? x[i + j] : most[j];
        }
    }
    for (; i < n; ++i) {
        most[0] = x[i] > most[0] ? x[i] : most[0];
    }
    for (int width = LANES / 2; width > 0; width /= 2) {
        for (int j = 0; j < width; ++j) {
            most[j] = most[j + width] > most[j] ? most[j + width] : most[j];
        }
    }
    *s = most[0];
}
#define ggml_vec_max_f32 lmweb_vec_max_f32
#endif
