// Parts of llama.cpp's attention over a prompt (a tile of queries against tiles of keys) that it does one number after the other and that
// take as long as its products: the mask, the keys' transposition and the maximum of a row. attention.cmake puts the calls into its source.
// The results stay the same to the bit.
#pragma once

#include "simd-mappings.h"
#include "vec.h"

#if defined(__AVX512F__) && defined(__AVX512BW__)
#define LMWEB_AVX512
#include <immintrin.h>
#endif

enum lmweb_mask { LMWEB_HIDDEN, LMWEB_SEEN, LMWEB_MIXED };

// Finds the maximum of n numbers; which comes first does not matter.
static inline void lmweb_vec_max_f32(const int n, float * most, const float * x) {
    int i = 0;
#ifdef LMWEB_AVX512
    __m512 lanes = _mm512_set1_ps(-INFINITY);
    for (; i + 16 <= n; i += 16) {
        lanes = _mm512_max_ps(lanes, _mm512_loadu_ps(x + i));
    }
    *most = _mm512_reduce_max_ps(lanes);
#else
    enum { LANES = 16 };  // which compilers turn into vector instructions
    float lanes[LANES];
    for (int j = 0; j < LANES; ++j) {
        lanes[j] = -INFINITY;
    }
    for (; i + LANES <= n; i += LANES) {
        for (int j = 0; j < LANES; ++j) {
            lanes[j] = x[i + j] > lanes[j] ? x[i + j] : lanes[j];
        }
    }
    for (int width = LANES / 2; width > 0; width /= 2) {
        for (int j = 0; j < width; ++j) {
            lanes[j] = lanes[j + width] > lanes[j] ? lanes[j + width] : lanes[j];
        }
    }
    *most = lanes[0];
#endif
    for (; i < n; ++i) {
        *most = x[i] > *most ? x[i] : *most;
    }
}
#ifndef GGML_USE_ACCELERATE
#define ggml_vec_max_f32 lmweb_vec_max_f32
#endif

#ifdef LMWEB_AVX512
// Says whether all of n numbers, a multiple of 32 per row, hide their cell (-inf) or all leave it as it is (0): so are nearly all tiles.
static inline lmweb_mask lmweb_mask_kind(const char * mask, size_t row_size, int rows, int n) {
    const __m512i hidden = _mm512_set1_epi16((short) 0xFC00);
    bool any_hidden = false, any_seen = false, any_other = false;
    for (int row = 0; row < rows; ++row) {
        for (int i = 0; i < n; i += 32) {
            const __m512i x = _mm512_loadu_si512(mask + row * row_size + i * sizeof(ggml_fp16_t));
            const __mmask32 is_hidden = _mm512_cmpeq_epi16_mask(x, hidden);
            const __mmask32 is_seen = _mm512_testn_epi16_mask(x, x);
            any_hidden |= is_hidden != 0;
            any_seen |= is_seen != 0;
            any_other |= (is_hidden | is_seen) != 0xFFFFFFFF;
        }
        if (any_other || (any_hidden && any_seen)) {
            return LMWEB_MIXED;
        }
    }
    return any_seen ? LMWEB_SEEN : LMWEB_HIDDEN;
}
#endif

// Turns a tile of the mask, n halves in each of its rows, into floats times slope, rows of tile_size filled up with -inf. Does not write
// the tile where all of it is hidden or all seen, and says so.
static inline lmweb_mask lmweb_mask_tile(float * out, int tile_size, const char * mask, size_t row_size, int rows, int n, float slope) {
#ifdef LMWEB_AVX512
    if (n == tile_size && n % 32 == 0) {
        const lmweb_mask kind = lmweb_mask_kind(mask, row_size, rows, n);
        if (kind != LMWEB_MIXED) {
            return kind;
        }
    }
#endif
    bool any_seen = false;
    for (int row = 0; row < rows; ++row, out += tile_size) {
        ggml_cpu_fp16_to_fp32((const ggml_fp16_t *) (mask + row * row_size), out, n);
        for (int i = 0; i < n; ++i) {
            out[i] *= slope;
        }
        for (int i = n; i < tile_size; ++i) {
            out[i] = -INFINITY;
        }
        float most;
        lmweb_vec_max_f32(n, &most, out);
        any_seen |= most > -INFINITY;
    }
    return any_seen ? LMWEB_MIXED : LMWEB_HIDDEN;
}

#ifdef LMWEB_AVX512
// Writes 16 numbers of 16 keys, transposed: out[i][j] = keys[j][i].
static inline void lmweb_transpose_16x16(float * out, int out_size, const char * keys, size_t key_size) {
    __m512 a[16], b[16];
    for (int i = 0; i < 16; ++i) {
        a[i] = _mm512_cvtph_ps(_mm256_loadu_si256((const __m256i *) (keys + i * key_size)));
    }
    for (int i = 0; i < 16; i += 2) {  // pairs of keys
        b[i]     = _mm512_unpacklo_ps(a[i], a[i + 1]);
        b[i + 1] = _mm512_unpackhi_ps(a[i], a[i + 1]);
    }
    for (int i = 0; i < 16; i += 4) {  // fours
        for (int j = 0; j < 2; ++j) {
            const __m512d low = _mm512_castps_pd(b[i + j]), high = _mm512_castps_pd(b[i + j + 2]);
            a[i + 2 * j]     = _mm512_castpd_ps(_mm512_unpacklo_pd(low, high));
            a[i + 2 * j + 1] = _mm512_castpd_ps(_mm512_unpackhi_pd(low, high));
        }
    }
    for (int i = 0; i < 4; ++i) {  // eights
        b[i]      = _mm512_shuffle_f32x4(a[i],     a[i + 4],  0x88);
        b[i + 4]  = _mm512_shuffle_f32x4(a[i],     a[i + 4],  0xdd);
        b[i + 8]  = _mm512_shuffle_f32x4(a[i + 8], a[i + 12], 0x88);
        b[i + 12] = _mm512_shuffle_f32x4(a[i + 8], a[i + 12], 0xdd);
    }
    for (int i = 0; i < 4; ++i) {  // all sixteen
        _mm512_storeu_ps(out + i * out_size,        _mm512_shuffle_f32x4(b[i],     b[i + 8],  0x88));
        _mm512_storeu_ps(out + (i + 4) * out_size,  _mm512_shuffle_f32x4(b[i + 4], b[i + 12], 0x88));
        _mm512_storeu_ps(out + (i + 8) * out_size,  _mm512_shuffle_f32x4(b[i],     b[i + 8],  0xdd));
        _mm512_storeu_ps(out + (i + 12) * out_size, _mm512_shuffle_f32x4(b[i + 4], b[i + 12], 0xdd));
    }
}
#endif

// Turns n keys of `size` halves into floats, transposed: out[i][j] = keys[j][i], rows of out_size.
static inline void lmweb_pack_keys(float * out, int out_size, const char * keys, size_t key_size, int n, int64_t size) {
    int key = 0;
#ifdef LMWEB_AVX512
    for (; size % 16 == 0 && key + 16 <= n; key += 16) {
        for (int64_t i = 0; i < size; i += 16) {
            lmweb_transpose_16x16(out + i * out_size + key, out_size, keys + key * key_size + i * sizeof(ggml_fp16_t), key_size);
        }
    }
#endif
    for (; key < n; ++key) {
        const ggml_fp16_t * halves = (const ggml_fp16_t *) (keys + key * key_size);
        for (int64_t i = 0; i < size; ++i) {
            out[i * out_size + key] = GGML_CPU_FP16_TO_FP32(halves[i]);
        }
    }
}
