// The types of numbers in memory, and how many of them a CPU kernel takes at a time.
#pragma once
#include <stdint.h>

namespace kdfast {

enum class Element : int { f32, bf16, f16, f64 };

static inline int64_t size_of(Element type) { return type == Element::f64 ? 8 : type == Element::f32 ? 4 : 2; }

// Columns that are taken at a time.
constexpr int64_t kBlock = 1024;

}  // namespace kdfast
