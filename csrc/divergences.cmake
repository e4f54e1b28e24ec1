# kdfast_divergences: the terms of KDFAST_DIVERGENCES, which is the only list of them.
set(header ${CMAKE_CURRENT_LIST_DIR}/common/divergence_terms.h)
set_property(DIRECTORY APPEND PROPERTY CMAKE_CONFIGURE_DEPENDS ${header})
file(READ ${header} kdfast_divergences)
string(REGEX MATCHALL "X\\([a-z_]+, [A-Za-z]+\\)" kdfast_divergences "${kdfast_divergences}")
list(TRANSFORM kdfast_divergences REPLACE "X\\([a-z_]+, ([A-Za-z]+)\\)" "\\1")
