// The types of numbers in memory.
#pragma once

namespace kdfast::cuda {

enum class Element : int { f32, bf16, f16 };

}  // namespace kdfast::cuda
