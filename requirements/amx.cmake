# Read by builds of llama.cpp after each project(): see amx.h.
if(CMAKE_SOURCE_DIR STREQUAL CMAKE_CURRENT_SOURCE_DIR AND CMAKE_CXX_COMPILER_ID STREQUAL "GNU" AND CMAKE_VERSION VERSION_GREATER_EQUAL 3.19)
  set(LMWEB_AMX_HEADER "${CMAKE_CURRENT_LIST_DIR}/amx.h")
  function(lmweb_mend_amx)
    if(TARGET ggml-cpu AND CMAKE_CXX_COMPILER_VERSION VERSION_LESS 14)
      get_target_property(folder ggml-cpu SOURCE_DIR)
      set_property(
        SOURCE "${folder}/ggml-cpu/amx/mmq.cpp" TARGET_DIRECTORY ggml-cpu
        APPEND PROPERTY COMPILE_OPTIONS -include "${LMWEB_AMX_HEADER}")
    endif()
  endfunction()
  cmake_language(DEFER CALL lmweb_mend_amx)
endif()
