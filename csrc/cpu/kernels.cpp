// What a CPU variant consists of.
#include "cpu/blocks.h"
#include "cpu/variant.h"

namespace kdfast::KDFAST_VARIANT {

extern const DivergenceKernels kDivergences[];
extern const LayerKernels kLayers;
extern const QkKernels kQkMse, kQkKl;
extern const PartKernels kParts;
extern const BlockKernels kBlocks[], kAmxBlocks[];
extern const ProductKernels kProducts[], kAmxProducts[];

namespace {

void exp2_all(const float* x, float* y, int64_t n) {
  for_vectors<float>(n, [&](int64_t i, int count, int) { store(y + i, exp2(load(x + i, count)), count); });
}
void log2_all(const float* x, float* y, int64_t n) {
  for_vectors<float>(n, [&](int64_t i, int count, int) { store(y + i, log2(load(x + i, count)), count); });
}

}  // namespace

const VariantKernels kKernels = {kDivergences, &kLayers,  {&kQkMse, &kQkKl}, &kParts,
                                 kBlocks,      kProducts, exp2_all,          log2_all};
#if defined(__AVX512BF16__)
const VariantKernels kAmxKernels = {kDivergences, &kLayers,     {&kQkMse, &kQkKl}, &kParts,
                                    kAmxBlocks,   kAmxProducts, exp2_all,          log2_all};
#endif

}  // namespace kdfast::KDFAST_VARIANT
