# SPDX-License-Identifier: Apache-2.0
# cutlass_dir: the CUTLASS headers. SEER_CUTLASS_DIR, else the installed nvidia-cutlass package, else
# a folder that compilers on this machine commonly see, else the package's file from PyPI, which is
# fetched once into the build folder (SEER_CUTLASS_URL="" forbids that).
set(SEER_CUTLASS_URL
  "https://files.pythonhosted.org/packages/21/6b/e86fc2fd536dd4b8bd2209aa31d7002610c501b0802337787eac9c9b328c/nvidia_cutlass-4.2.0.0-py3-none-any.whl"
  CACHE STRING "Where the nvidia-cutlass wheel is fetched from if no CUTLASS headers are found")
set(cutlass_sha256 f9599ada45c7bcb6bf53f7d3f0a7d154183e53451c01bfa59eecd37dd4a693f6)

set(cutlass_dir "${SEER_CUTLASS_DIR}")
if(NOT cutlass_dir)
  python_package_dirs(cutlass_package cutlass_library)
  find_path(cutlass_found cute/tensor.hpp NO_CACHE
    HINTS "${cutlass_package}/source/include" ENV CUTLASS_PATH
    PATHS /usr/local/cutlass /usr/local/cuda
    PATH_SUFFIXES include)
  if(cutlass_found)
    set(cutlass_dir "${cutlass_found}")
  elseif(SEER_CUTLASS_URL)
    set(cutlass_dir "${CMAKE_BINARY_DIR}/cutlass/cutlass_library/source/include")
    if(NOT EXISTS "${cutlass_dir}/cute/tensor.hpp")
      message(STATUS "seer_cuda: no CUTLASS headers found, fetching ${SEER_CUTLASS_URL}")
      set(wheel "${CMAKE_BINARY_DIR}/nvidia_cutlass.zip")
      file(DOWNLOAD "${SEER_CUTLASS_URL}" "${wheel}" STATUS status)
      list(GET status 0 code)
      if(code EQUAL 0)
        file(SHA256 "${wheel}" sha256)
        if(NOT sha256 STREQUAL cutlass_sha256)
          message(FATAL_ERROR "seer_cuda: SEER_CUTLASS_URL: expected the nvidia-cutlass wheel with "
                              "SHA-256 ${cutlass_sha256}, got ${sha256}.")
        endif()
        file(ARCHIVE_EXTRACT INPUT "${wheel}" DESTINATION "${CMAKE_BINARY_DIR}/cutlass"
             PATTERNS "cutlass_library/source/include/*")
      endif()
      file(REMOVE "${wheel}")
    endif()
  endif()
endif()
if(NOT EXISTS "${cutlass_dir}/cute/tensor.hpp")
  message(FATAL_ERROR "seer_cuda: CUTLASS headers were not found in '${cutlass_dir}'. "
                      "Install nvidia-cutlass==4.2.0.0 (pip) or set SEER_CUTLASS_DIR to the include "
                      "folder of a CUTLASS 4.2 checkout.")
endif()
