# SPDX-License-Identifier: Apache-2.0
# From SEER_ARCHS:
#   lowest_arch     the portable kernels run on this one and every later one: the dispatch asks it
#   portable_archs  what they are compiled for: machine code for every architecture named (a Hopper GPU
#                   runs them beside 90a's own: sm_90 code spares it a compile from PTX), and PTX of
#                   the lowest, so that all other GPUs the dispatch sends here run too
string(REGEX REPLACE "[af]" "" numeric_archs "${SEER_ARCHS}")
list(SORT numeric_archs COMPARE NATURAL)
list(REMOVE_DUPLICATES numeric_archs)
list(GET numeric_archs 0 lowest_arch)
list(TRANSFORM numeric_archs APPEND "-real" OUTPUT_VARIABLE portable_archs)
list(APPEND portable_archs "${lowest_arch}-virtual")
