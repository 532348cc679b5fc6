# SPDX-License-Identifier: Apache-2.0
"""Gates in models of other libraries, each imported only when its module is used."""
