# SPDX-License-Identifier: Apache-2.0
# python_package_dirs(OUT PACKAGE): the folders of an installed Python package, without importing
# it; empty if it is not installed, or there is no Python.
function(python_package_dirs out package)
  set(${out} "" PARENT_SCOPE)
  if(NOT Python_Interpreter_FOUND)
    return()
  endif()
  execute_process(
    COMMAND "${Python_EXECUTABLE}" -c
"from importlib.util import find_spec
spec = find_spec('${package}')
print(';'.join(spec.submodule_search_locations) if spec else '')"
    OUTPUT_VARIABLE dirs OUTPUT_STRIP_TRAILING_WHITESPACE)
  set(${out} "${dirs}" PARENT_SCOPE)
endfunction()
