# SPDX-License-Identifier: Apache-2.0
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
