# SPDX-License-Identifier: Apache-2.0
"""Tools of the fork: `build` and what it imports make the wheel; the rest is for
maintainers (`tree` edits patches, `mutants` proves tests)."""
