# Read by the build of llama-cpp-python after its project().

# Leaves out a library that only llama.cpp's own programs use and that would take a third of the compiling time. A plain variable
# wins over the cache entry which that build forces.
set(LLAMA_BUILD_COMMON OFF)

# The intrinsics of older GCCs (12.2 of Debian 12 among them) let the compiler drop most of the tile configuration that llama.cpp writes.
# On a processor with AMX every prompt then ends the process with an illegal instruction. So AMX is compiled in only where it works,
# which includes that the kernel (or the virtual machine) allows it.
include(CheckCXXSourceRuns)
set(CMAKE_REQUIRED_FLAGS "-O3 -march=native")
check_cxx_source_runs("
#ifdef __AMX_INT8__
#include <immintrin.h>
#include <sys/syscall.h>
#include <unistd.h>
struct Tiles { unsigned char palette, start_row, reserved[14]; unsigned short colsb[16]; unsigned char rows[16]; };
int main() {
    if (syscall(SYS_arch_prctl, 0x1023, 18)) return 1; // ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA
    alignas(64) Tiles tiles = {};
    tiles.palette = 1;
    tiles.rows[0] = 8;
    tiles.colsb[0] = 64;
    _tile_loadconfig(&tiles);
    _tile_zero(0); // an illegal instruction where the tile has no rows
    return 0;
}
#else
int main() { return 0; }
#endif
" LMWEB_AMX_WORKS)
unset(CMAKE_REQUIRED_FLAGS)
if(NOT LMWEB_AMX_WORKS)
    add_compile_options("$<$<COMPILE_LANGUAGE:C,CXX>:-U__AMX_INT8__>")
endif()
