# SPDX-License-Identifier: Apache-2.0
# csrc/variants.json, the support matrix, becomes one small CUDA source per row (they compile side
# by side) and, for each operator, <op>_variants.inc, the rows of its C++ table. CMake reads the JSON itself, so a build
# without Python's help sees the same table. SEER_VARIANT_SOURCES lists the portable sources,
# SEER_SM90_VARIANT_SOURCES those for compute capability 9.0 alone: empty without 90a in SEER_ARCHS,
# as their instructions exist in no other architecture's code.
set(variants_file "${CMAKE_CURRENT_SOURCE_DIR}/csrc/variants.json")
set_property(DIRECTORY APPEND PROPERTY CMAKE_CONFIGURE_DEPENDS "${variants_file}")
file(READ "${variants_file}" variants)
string(JSON variant_count LENGTH "${variants}" kernels)
math(EXPR last_variant "${variant_count} - 1")

set(SEER_VARIANT_SOURCES "")
set(SEER_SM90_VARIANT_SOURCES "")
foreach(op IN ITEMS block_sparse_attn attn_pool)
  set(table_${op} "")
endforeach()
if(SEER_HAVE_CUDA)
  foreach(index RANGE ${last_variant})
    foreach(field IN ITEMS name op sm dtype head_dim block_q tile_kv threads smem_bytes)
      string(JSON ${field} GET "${variants}" kernels ${index} ${field})
    endforeach()
    if(sm EQUAL 90 AND NOT "90a" IN_LIST SEER_ARCHS)
      continue()
    endif()
    set(source "${CMAKE_CURRENT_BINARY_DIR}/generated/${name}.cu")
    configure_file("csrc/${op}/sm${sm}_variant.cu.in" "${source}" @ONLY)
    if(sm EQUAL 90)
      list(APPEND SEER_SM90_VARIANT_SOURCES "${source}")
    else()
      list(APPEND SEER_VARIANT_SOURCES "${source}")
    endif()
    string(APPEND table_${op} "SEER_VARIANT(${name}, ${sm}, ${dtype}, ${head_dim}, ${block_q}, "
                        "${tile_kv}, ${threads}, ${smem_bytes})\n")
  endforeach()
endif()
foreach(op IN ITEMS block_sparse_attn attn_pool)
  file(CONFIGURE OUTPUT generated/${op}_variants.inc CONTENT "${table_${op}}" @ONLY)
endforeach()
