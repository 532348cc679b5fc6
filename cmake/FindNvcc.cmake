# SPDX-License-Identifier: Apache-2.0
# Finds nvcc and enables the CUDA language: first the machine's toolkit, then the compiler wheels
# from PyPI (nvidia-cuda-nvcc, -crt, -nvvm, -cccl and -runtime together are a full toolkit under
# site-packages/nvidia/cu13). Without any, SEER_HAVE_CUDA is OFF and the build is CPU-only.
set(SEER_HAVE_CUDA OFF)
if(SEER_CUDA STREQUAL "OFF")
  message(STATUS "seer_cuda: SEER_CUDA=OFF, building the CPU kernels only")
  return()
endif()

if(NOT CMAKE_CUDA_COMPILER)
  python_package_dirs(wheel_roots nvidia)
  set(wheel_dirs "")
  foreach(root IN LISTS wheel_roots)
    file(GLOB found "${root}/cu1[3-9]/bin")
    list(APPEND wheel_dirs ${found})
  endforeach()
  find_program(SEER_NVCC nvcc
    HINTS ENV CUDACXX ENV CUDA_HOME ENV CUDA_PATH
    PATHS /usr/local/cuda ${wheel_dirs}
    PATH_SUFFIXES bin)
  if(DEFINED ENV{CUDACXX})
    set(CMAKE_CUDA_COMPILER "$ENV{CUDACXX}")
  elseif(SEER_NVCC)
    set(CMAKE_CUDA_COMPILER "${SEER_NVCC}")
  endif()
endif()

if(NOT CMAKE_CUDA_COMPILER)
  if(SEER_CUDA STREQUAL "ON")
    message(FATAL_ERROR "seer_cuda: SEER_CUDA=ON but no nvcc was found on PATH, in CUDA_HOME, in "
                        "/usr/local/cuda or in the nvidia-cuda-nvcc wheels.")
  endif()
  message(WARNING "seer_cuda: no nvcc found: building the CPU kernels only. For the CUDA kernels "
                  "install a CUDA toolkit (12.4 or newer) or the PyPI packages nvidia-cuda-nvcc, "
                  "nvidia-cuda-crt, nvidia-nvvm, nvidia-cuda-cccl and nvidia-cuda-runtime, and "
                  "install again.")
  return()
endif()

# Architectures are set per target; this one only serves CMake's compiler check.
set(CMAKE_CUDA_ARCHITECTURES 80)
set(CMAKE_CUDA_RUNTIME_LIBRARY Static)
# The wheels keep the runtime in lib, while nvcc's own profile looks in lib64.
get_filename_component(nvcc_root "${CMAKE_CUDA_COMPILER}/../.." REALPATH)
if(EXISTS "${nvcc_root}/lib/libcudart_static.a" AND NOT EXISTS "${nvcc_root}/lib64")
  set(ENV{LIBRARY_PATH} "${nvcc_root}/lib:$ENV{LIBRARY_PATH}")
endif()
enable_language(CUDA)
if(CMAKE_CUDA_COMPILER_VERSION VERSION_LESS 12.4)
  message(FATAL_ERROR "seer_cuda: nvcc: expected 12.4 or newer, got ${CMAKE_CUDA_COMPILER_VERSION} "
                      "(${CMAKE_CUDA_COMPILER}). Name a newer one in CUDACXX, or build the CPU "
                      "kernels only with SEER_CUDA=OFF.")
endif()
# CMake 3.25 does not know nvcc 13's C++20 mode: it drops CMAKE_CUDA_STANDARD 20 and would append
# its own default, -std=c++17. No default, then, and the flag by hand.
set(CMAKE_CUDA_STANDARD_DEFAULT "")
set(CMAKE_CUDA_FLAGS "${CMAKE_CUDA_FLAGS} -std=c++20")

# Static and hidden: libseer_ops.so needs no libcudart of the right major version beside it. Not
# find_package(CUDAToolkit): that insists on libcudart.so, which the compiler wheels do not have.
find_library(SEER_CUDART cudart_static
  HINTS ${CMAKE_CUDA_IMPLICIT_LINK_DIRECTORIES} "${CMAKE_CUDA_COMPILER_TOOLKIT_ROOT}" "${nvcc_root}"
  PATH_SUFFIXES lib lib64 REQUIRED)
set(SEER_HAVE_CUDA ON)
message(STATUS "seer_cuda: nvcc ${CMAKE_CUDA_COMPILER_VERSION} (${CMAKE_CUDA_COMPILER}), "
               "architectures ${SEER_ARCHS}")
