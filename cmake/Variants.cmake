# SPDX-License-Identifier: Apache-2.0
# csrc/variants.json, the support matrix, becomes one small CUDA source per row (they compile side
# by side) and, for each operator, <op>_variants.inc, the rows of its C++ table. CMake reads the
# JSON itself, so a build without Python's help sees the same table. SEER_VARIANT_SOURCES lists the portable sources,
# SEER_SM90_VARIANT_SOURCES those for compute capability 9.0 alone: empty without 90a in SEER_ARCHS,
# as their instructions exist in no other architecture's code.
set(variants_file "${CMAKE_CURRENT_SOURCE_DIR}/csrc/variants.json")
set_property(DIRECTORY APPEND PROPERTY CMAKE_CONFIGURE_DEPENDS "${variants_file}")
file(READ "${variants_file}" variants)
string(JSON variant_count LENGTH "${variants}" kernels)
math(EXPR last_variant "${variant_count} - 1")

# The fields of a row beside name, op, sm, dtype and head_dim, in the order of the C++ table.
set(fields_of_block_sparse_attn block_q tile_kv threads smem_bytes)
set(fields_of_attn_pool ${fields_of_block_sparse_attn})
set(ops block_sparse_attn attn_pool pool_gate gate_scores gate_select)

set(SEER_VARIANT_SOURCES "")
set(SEER_SM90_VARIANT_SOURCES "")
foreach(op IN LISTS ops)
  set(table_of_${op} "")
endforeach()
if(SEER_HAVE_CUDA)
  foreach(index RANGE ${last_variant})
    string(JSON op GET "${variants}" kernels ${index} op)
    set(row "")
    foreach(field IN ITEMS name sm dtype head_dim ${fields_of_${op}})
      string(JSON ${field} GET "${variants}" kernels ${index} ${field})
      list(APPEND row "${${field}}")
    endforeach()
    if(sm EQUAL 90 AND NOT "90a" IN_LIST SEER_ARCHS)
      continue()
    endif()
    set(source "${CMAKE_CURRENT_BINARY_DIR}/generated/${name}.cu")
    # The gate's ops live together.
    set(template "csrc/${op}/sm${sm}_variant.cu.in")
    if(op MATCHES "gate")
      set(template "csrc/pool_gate/${op}_sm${sm}_variant.cu.in")
    endif()
    configure_file("${template}" "${source}" @ONLY)
    if(sm EQUAL 90)
      list(APPEND SEER_SM90_VARIANT_SOURCES "${source}")
    else()
      list(APPEND SEER_VARIANT_SOURCES "${source}")
    endif()
    list(JOIN row ", " row)
    string(APPEND table_of_${op} "SEER_VARIANT(${row})\n")
  endforeach()
endif()
foreach(op IN LISTS ops)
  file(CONFIGURE OUTPUT "generated/${op}_variants.inc" CONTENT "${table_of_${op}}" @ONLY)
endforeach()
