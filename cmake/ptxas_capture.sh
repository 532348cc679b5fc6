#!/bin/sh
# SPDX-License-Identifier: Apache-2.0
# Compiler launcher: keeps what ptxas -v prints beside the object file (OBJECT.ptxas), where
# ptxas_report.py reads it, and shows only real diagnostics: of ptxas's info lines those that have
# a number, such as "(C7510) Potential Performance Loss".
previous=
object=/dev/null
for argument; do
  [ "$previous" = -o ] && object=$argument
  previous=$argument
done
"$@" 2> "$object.ptxas"
code=$?
grep -v -e '^ptxas info *: [^(]' -e 'bytes stack frame' -e '^$' "$object.ptxas" >&2
exit $code
