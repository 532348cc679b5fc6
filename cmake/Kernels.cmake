# SPDX-License-Identifier: Apache-2.0
# The CUDA kernels: sources, architectures and flags, and the ptxas report.
include(Cutlass)

set(kernel_logs "")     # one ptxas log per CUDA object, read after all of them are compiled
set(kernel_objects "")

# Compiles CUDA sources into an object library for these architectures.
macro(add_kernels target archs)
  target_sources(${target} PRIVATE ${ARGN})
  target_include_directories(${target} SYSTEM PRIVATE
    "${cutlass_dir}" ${CMAKE_CUDA_TOOLKIT_INCLUDE_DIRECTORIES})
  set_target_properties(${target} PROPERTIES
    CUDA_ARCHITECTURES "${archs}"
    CUDA_VISIBILITY_PRESET hidden
    CUDA_COMPILER_LAUNCHER "${CMAKE_CURRENT_SOURCE_DIR}/cmake/ptxas_capture.sh")
  # No --use_fast_math: where a fast instruction is meant, the kernel names it.
  target_compile_options(${target} PRIVATE
    $<$<COMPILE_LANGUAGE:CUDA>:--expt-relaxed-constexpr -lineinfo
      -Xptxas=-v,--warn-on-spills,--warn-on-local-memory-usage>)
  foreach(source IN ITEMS ${ARGN})
    string(REPLACE "${CMAKE_CURRENT_BINARY_DIR}/" "" relative "${source}")
    list(APPEND kernel_logs
         "${CMAKE_CURRENT_BINARY_DIR}/CMakeFiles/${target}.dir/${relative}.o.ptxas")
  endforeach()
  list(APPEND kernel_objects $<TARGET_OBJECTS:${target}>)
endmacro()

add_kernels(seer_kernels "${portable_archs}"
  csrc/block_bits/block_bits.cu
  csrc/common/varlen_fill.cu
  ${SEER_VARIANT_SOURCES})
target_sources(seer_kernels PRIVATE
  csrc/attn_pool/launch.cpp
  csrc/block_sparse_attn/launch.cpp
  csrc/block_sparse_attn/launch_checks.cpp
  csrc/pool_gate/launch.cpp)
target_link_libraries(seer_kernels PUBLIC "${SEER_CUDART}" dl rt pthread)

# No PTX here: that of an architecture-specific target runs nowhere else.
if(SEER_SM90_VARIANT_SOURCES)
  add_library(seer_kernels_sm90 OBJECT)
  target_include_directories(seer_kernels_sm90 PRIVATE csrc/include csrc "${generated}")
  add_kernels(seer_kernels_sm90 90a-real ${SEER_SM90_VARIANT_SOURCES})
  target_link_libraries(seer_kernels INTERFACE $<TARGET_OBJECTS:seer_kernels_sm90>)
endif()

if(NOT Python_Interpreter_FOUND)
  add_custom_target(seer_resources)  # without Python there is no _core to read them
  return()
endif()
add_custom_command(
  OUTPUT "${resources}" "${CMAKE_CURRENT_BINARY_DIR}/ptxas.json"
  COMMAND "${Python_EXECUTABLE}" "${CMAKE_CURRENT_SOURCE_DIR}/cmake/ptxas_report.py"
    --json "${CMAKE_CURRENT_BINARY_DIR}/ptxas.json" --inc "${resources}" ${kernel_logs}
  DEPENDS ${kernel_objects} "${CMAKE_CURRENT_SOURCE_DIR}/cmake/ptxas_report.py"
  COMMENT "Reading registers and spills of the kernels"
  VERBATIM)
add_custom_target(seer_resources DEPENDS "${resources}")
