// What a CPU variant consists of.
#include "cpu/blocks.h"
#include "cpu/variant.h"

namespace kdfast::KDFAST_VARIANT {

extern const DivergenceKernels kDivergences[];
extern const LayerKernels kLayers;
extern const QkKernels kQkMse, kQkKl;
extern const PartKernels kParts;
extern const ColumnSums kColumnSums[];
extern const BlockKernels kBlocks[], kPairBlocks[], kAmxBlocks[];
extern const ProductKernels kProducts[], kPairProducts[], kAmxProducts[];

namespace {

void exp2_all(const float* x, float* y, int64_t n) {
  for_vectors<float>(n, [&](int64_t i, int count, int) { store(y + i, exp2(load(x + i, count)), count); });
}
void log2_all(const float* x, float* y, int64_t n) {
  for_vectors<float>(n, [&](int64_t i, int count, int) { store(y + i, log2(load(x + i, count)), count); });
}

constexpr VariantKernels kernels_with(const BlockKernels* blocks, const ProductKernels* products) {
  return {kDivergences, &kLayers, {&kQkMse, &kQkKl}, &kParts, kColumnSums, blocks, products, exp2_all, log2_all};
}

}  // namespace

const VariantKernels kKernels = kernels_with(kBlocks, kProducts);
#if defined(__AVX512BF16__)
const VariantKernels kPairKernels = kernels_with(kPairBlocks, kPairProducts);
const VariantKernels kAmxKernels = kernels_with(kAmxBlocks, kAmxProducts);
#endif

}  // namespace kdfast::KDFAST_VARIANT
