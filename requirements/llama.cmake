# Read by the build of llama-cpp-python after its project(): leaves out a library that only llama.cpp's own programs use and that
# would take a third of the compiling time. A plain variable wins over the cache entry which that build forces.
set(LLAMA_BUILD_COMMON OFF)
include("${CMAKE_CURRENT_LIST_DIR}/amx.cmake")

# Attention on a CPU. With AVX512-FP16 llama.cpp's loops over halves take 128 numbers at once and do what is left one by one. Heads of 64
# are all left over: a decode step took twice as long. Without these instructions they are computed in F32, 16 at once, more exactly too.
if(CMAKE_SOURCE_DIR STREQUAL CMAKE_CURRENT_SOURCE_DIR AND CMAKE_VERSION VERSION_GREATER_EQUAL 3.19)
  set(LMWEB_ROW_MAX "${CMAKE_CURRENT_LIST_DIR}/row_max.h")
  function(lmweb_speed_attention)
    if(NOT TARGET ggml-cpu)
      return()
    endif()
    include(CheckCXXCompilerFlag)
    check_cxx_compiler_flag(-mno-avx512fp16 LMWEB_KNOWS_FP16)
    if(LMWEB_KNOWS_FP16)
      target_compile_options(ggml-cpu PRIVATE -mno-avx512fp16)
    endif()
    if(CMAKE_CXX_COMPILER_ID MATCHES "GNU|Clang")
      get_target_property(folder ggml-cpu SOURCE_DIR)
      set_property(
        SOURCE "${folder}/ggml-cpu/ops.cpp" TARGET_DIRECTORY ggml-cpu APPEND PROPERTY COMPILE_OPTIONS -include "${LMWEB_ROW_MAX}")
    endif()
  endfunction()
  cmake_language(DEFER CALL lmweb_speed_attention)
endif()
