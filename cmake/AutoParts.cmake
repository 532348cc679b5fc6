# SPDX-License-Identifier: Apache-2.0
# The parts that are AUTO, ON or OFF. Another word would pass for ON.
foreach(option IN ITEMS SEER_CUDA SEER_TORCH SEER_PYTHON SEER_BENCH)
  string(TOUPPER "${${option}}" ${option})
  if(NOT ${option} MATCHES "^(AUTO|ON|OFF)$")
    message(FATAL_ERROR "seer_cuda: ${option}: expected AUTO, ON or OFF, got '${${option}}'.")
  endif()
endforeach()

# resolve_auto(OPTION FOUND NEEDS): AUTO becomes ON where FOUND is true, else OFF, and the log says
# what is left out and what it needs. ON stays ON: what is missing is then an error where it is used.
function(resolve_auto option found needs)
  if(NOT "${${option}}" STREQUAL "AUTO")
    return()
  endif()
  if(found)
    set(${option} ON PARENT_SCOPE)
  else()
    set(${option} OFF PARENT_SCOPE)
    message(STATUS "seer_cuda: ${option} is off: ${needs} (-D${option}=ON makes this an error)")
  endif()
endfunction()
