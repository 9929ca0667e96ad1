// GCC up to version 13 tells its optimiser that the instruction reads 8 bytes of the tile configuration, which has 64: the others may
// never be written, and the first use of a tile ends the process. Here it is told all of them.
#include <immintrin.h>
#define _tile_loadconfig(config) __asm__ volatile("ldtilecfg\t%X0" ::"m"(*(const char(*)[64])(config)))
