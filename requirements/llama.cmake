# Read by the build of llama-cpp-python after its project(): leaves out a library that only llama.cpp's own programs use and that
# would take a third of the compiling time. A plain variable wins over the cache entry which that build forces.
set(LLAMA_BUILD_COMMON OFF)
include("${CMAKE_CURRENT_LIST_DIR}/amx.cmake")
include("${CMAKE_CURRENT_LIST_DIR}/attention.cmake")
