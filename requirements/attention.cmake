# Read by the build of llama-cpp-python: makes llama.cpp's attention on CPUs faster.
#
# 1. With AVX512-FP16 its loops over halves take 128 numbers at once and do what is left one by one. Heads of 64 are all left over: a
#    decode step took twice as long. Without these instructions they are computed in F32, 16 at once, more exactly too.
# 2. Over a prompt it converts the mask and the keys and looks for the maxima one number after the other: attention.h does that for
#    sixteen at once. The calls stand inside a function, so a changed copy of its source is compiled.

set(LMWEB_ATTENTION_HEADER "${CMAKE_CURRENT_LIST_DIR}/attention.h")

# Replaces text in the variable `source`. Stops the build where another llama.cpp has other text: then see whether this is still needed.
function(lmweb_replace old new)
  string(FIND "${source}" "${old}" found)
  if(found EQUAL -1)
    message(FATAL_ERROR "llama.cpp's ops.cpp has changed; requirements/attention.cmake does not find in it:\n${old}")
  endif()
  string(REPLACE "${old}" "${new}" source "${source}")
  set(source "${source}" PARENT_SCOPE)
endfunction()

function(lmweb_speed_attention)
  if(NOT TARGET ggml-cpu)
    return()
  endif()
  include(CheckCXXCompilerFlag)
  check_cxx_compiler_flag(-mno-avx512fp16 LMWEB_KNOWS_FP16)
  if(LMWEB_KNOWS_FP16)
    target_compile_options(ggml-cpu PRIVATE -mno-avx512fp16)
  endif()

  get_target_property(folder ggml-cpu SOURCE_DIR)
  file(READ "${folder}/ggml-cpu/ops.cpp" source)
  lmweb_replace([[#include "ops.h"]] "#include \"${LMWEB_ATTENTION_HEADER}\"\n#include \"ops.h\"")
  lmweb_replace([[
            // skip the tile entirely if all the masks are -inf
            if (mask) {
                bool can_skip = true;
                for (int tq = 0; tq < tile_rows; tq++) {
                    const ggml_fp16_t * mp_row = (const ggml_fp16_t *)((const char *) mask->data + (iq1 + tq)*mask->nb[1] + (iq2%mask->ne[2])*mask->nb[2] + (iq3%mask->ne[3])*mask->nb[3]);
                    for (int tk = 0; tk < kv_tile; tk++) {
                        mask32[tq * KV_TILE_SZ + tk] = slope * GGML_CPU_FP16_TO_FP32(mp_row[ic + tk]);
                        if (mask32[tq * KV_TILE_SZ + tk] != -INFINITY) {
                            can_skip = false;
                        }
                    }
                    // Pad remaining mask entries with -inf
                    for (int tk = kv_tile; tk < KV_TILE_SZ; tk++) {
                        mask32[tq * KV_TILE_SZ + tk] = -INFINITY;
                    }
                }

                if (can_skip) {
                    continue;
                }
            }
]] [[
            // skip the tile entirely if all the masks are -inf
            lmweb_mask kind = LMWEB_SEEN;
            if (mask) {
                const char * mask_rows = (const char *) mask->data + iq1*mask->nb[1] + (iq2%mask->ne[2])*mask->nb[2] + (iq3%mask->ne[3])*mask->nb[3];
                kind = lmweb_mask_tile(mask32, KV_TILE_SZ, mask_rows + ic*sizeof(ggml_fp16_t), mask->nb[1], tile_rows, kv_tile, slope);
                if (kind == LMWEB_HIDDEN) {
                    continue;
                }
            }
]])
  lmweb_replace([[
            if (mask) {
                ggml_vec_add_f32(tile_rows * KV_TILE_SZ, KQ, KQ, mask32);]] [[
            if (kind == LMWEB_MIXED) {
                ggml_vec_add_f32(tile_rows * KV_TILE_SZ, KQ, KQ, mask32);]])
  lmweb_replace([[
            for (int tk = 0; tk < kv_tile; tk++) {
                const char * k_data = (const char *)k->data + (ic + tk)*nbk1 + ik2*nbk2 + ik3*nbk3;
                if (kv_type == GGML_TYPE_F16) {
                    const ggml_fp16_t * k_f16 = (const ggml_fp16_t *)k_data;
                    for (int64_t dk = 0; dk < DK; dk++) {
                        K_f32[dk * KV_TILE_SZ + tk] = GGML_CPU_FP16_TO_FP32(k_f16[dk]);
                    }
                } else {
]] [[
            if (kv_type == GGML_TYPE_F16) {
                lmweb_pack_keys(K_f32, KV_TILE_SZ, (const char *)k->data + ic*nbk1 + ik2*nbk2 + ik3*nbk3, nbk1, kv_tile, DK);
            }
            for (int tk = 0; kv_type != GGML_TYPE_F16 && tk < kv_tile; tk++) {
                const char * k_data = (const char *)k->data + (ic + tk)*nbk1 + ik2*nbk2 + ik3*nbk3;
                {
]])

  set(copy "${CMAKE_BINARY_DIR}/lmweb/ops.cpp")
  file(WRITE "${copy}" "${source}")
  get_target_property(sources ggml-cpu SOURCES)
  list(TRANSFORM sources REPLACE "^.*ggml-cpu/ops\\.cpp$" "${copy}")
  set_target_properties(ggml-cpu PROPERTIES SOURCES "${sources}")
  target_include_directories(ggml-cpu PRIVATE "${folder}/ggml-cpu")
endfunction()

if(CMAKE_SOURCE_DIR STREQUAL CMAKE_CURRENT_SOURCE_DIR AND CMAKE_VERSION VERSION_GREATER_EQUAL 3.19)
  cmake_language(DEFER CALL lmweb_speed_attention)
endif()
