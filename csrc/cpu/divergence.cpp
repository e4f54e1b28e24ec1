// The divergences on the CPU: rows shared among the threads, each row by the kernels of the processor's variant.
//
// Rows are summed in chunks of a size that the shape alone decides, in double, and the chunks in order: the number of
// threads changes no sum, but for a few wide rows whose columns the threads share, where doubles merge in pieces.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <memory>
#include <numeric>
#include <tuple>

#include "cpu/divergence_call.h"

namespace kdfast {
namespace {

using torch::stable::parallel_for;

constexpr int64_t kChunkElements = 1 << 15;  // logits a chunk of rows holds, at least: enough to pay for sharing it out
constexpr int64_t kChunkRows = 64;           // whose descriptions fit in L1
constexpr int64_t kSegment = 16 * kBlock;    // columns of a piece, where single rows are shared among threads

// Walks the counted rows. `start(index, row)` may fill in states and factors before the work, `finish(index, row)`
// takes the results and returns the row's loss. `known`: what the states hold already.
template <class Start, class Finish>
class Driver {
 public:
  Driver(const Rows& rows, Known known, Start start, Finish finish)
      : rows_(rows), kernels_(rows.kernels), shape_(rows.shape), known_(known), start_(start), finish_(finish) {
    looks_ = known_ == Known::nothing;
    looks_again_ = kernels_.second_look && known_ != Known::everything;
    const bool written = looks_ && kernels_.difference && writes_at_once(shape_);
    writes_gradient_ = rows_.wants_gradient() && !written;
  }

  // The sum of what `finish` returned.
  RowLoss run() const {
    const int64_t columns = shape_.columns, threads = torch::stable::get_num_threads();
    if (rows_.count < 4 * threads && columns > kSegment) return few_wide_rows();
    const int64_t per_chunk = std::clamp<int64_t>(kChunkElements / std::max<int64_t>(columns, 1), 1, kChunkRows);
    std::vector<RowLoss> sums((rows_.count + per_chunk - 1) / per_chunk);
    parallel_for(0, int64_t(sums.size()), 1, [&](int64_t begin, int64_t end) {
      const auto powers = room_for_powers();
      for (int64_t c = begin; c < end; ++c) {
        sums[c] = chunk(c * per_chunk, std::min(rows_.count, (c + 1) * per_chunk), powers.get());
      }
    });
    RowLoss sum;
    for (const RowLoss& part : sums) sum += part;
    return sum;
  }

 private:
  // `entries`: room for the teacher's columns of all rows.
  int64_t gather(int64_t begin, int64_t end, DivergenceRow* batch, int64_t* index, TopkEntry* entries) const {
    int64_t n = 0;
    for (int64_t row = begin; row < end; ++row) {
      const bool counted = rows_.counted(row);
      rows_.clear_gradient(row, counted ? shape_.columns : 0);
      if (!counted) continue;
      rows_.describe(row, batch[n], entries + n * rows_.entries());
      index[n] = row;
      start_(row, batch[n++]);
    }
    return n;
  }

  // One row's, for one thread. Null where no gradient follows. Rows shared among threads do without: theirs
  // would all be needed at once, more memory than the gradient.
  std::unique_ptr<char[]> room_for_powers() const {
    const bool wanted = looks_ && writes_gradient_ && !in_lanes();
    return std::unique_ptr<char[]>(wanted ? new char[powers_bytes(shape_)] : nullptr);
  }

  bool in_lanes() const { return kernels_.narrow && shape_.columns <= kNarrow; }

  RowLoss finish_all(const DivergenceRow* batch, const int64_t* index, int64_t n) const {
    RowLoss sum;
    for (int64_t i = 0; i < n; ++i) sum += finish_(index[i], batch[i]);
    return sum;
  }

  RowLoss chunk(int64_t begin, int64_t end, char* powers) const {
    DivergenceRow batch[kChunkRows];
    int64_t index[kChunkRows];
    std::vector<TopkEntry> entries((end - begin) * rows_.entries());
    const int64_t n = gather(begin, end, batch, index, entries.data());
    if (in_lanes()) {
      double labels[kChunkRows];  // the gradient may take the logits' place
      for (int64_t i = 0; looks_ && i < n; ++i) labels[i] = rows_.label_logit(batch[i]);
      kernels_.narrow(shape_, batch, n, known_);
      for (int64_t i = 0; looks_ && i < n; ++i) batch[i].state.label = labels[i];
    } else {
      for (int64_t i = 0; i < n; ++i) wide_row(batch[i], powers);
    }
    return finish_all(batch, index, n);
  }

  void wide_row(DivergenceRow& row, char* powers) const {
    const int64_t columns = shape_.columns;
    row.powers = powers;
    if (looks_) kernels_.look(shape_, row, 0, columns);
    if (looks_) row.state.label = rows_.label_logit(row);
    if (looks_again_) kernels_.look_again(shape_, row, 0, columns);
    kernels_.finish(shape_, row);
    if (writes_gradient_) kernels_.gradient(shape_, row, 0, columns);
  }

  // ---- too few rows to keep every thread busy: the threads share each row's columns, in pieces ----
  struct Piece {
    int64_t row, begin, end;
    bool first;
  };
  int64_t pieces_per_row() const { return (shape_.columns + kSegment - 1) / kSegment; }
  Piece piece(int64_t number) const {
    const int64_t row = number / pieces_per_row(), begin = number % pieces_per_row() * kSegment;
    return {row, begin, std::min(shape_.columns, begin + kSegment), begin == 0};
  }
  using Look = void (*)(const DivergenceShape&, DivergenceRow&, int64_t begin, int64_t end);
  // What a look finds in every piece of the rows.
  std::vector<DivergenceRow> seen_in_pieces(Look look, const std::vector<DivergenceRow>& batch, int64_t rows) const {
    std::vector<DivergenceRow> seen(rows * pieces_per_row());
    parallel_for(0, int64_t(seen.size()), 1, [&](int64_t begin, int64_t end) {
      for (int64_t number = begin; number < end; ++number) {
        const Piece of = piece(number);
        seen[number] = batch[of.row];
        look(shape_, seen[number], of.begin, of.end);
      }
    });
    return seen;
  }
  void look_in_pieces(std::vector<DivergenceRow>& batch, int64_t rows) const {
    const std::vector<DivergenceRow> seen = seen_in_pieces(kernels_.look, batch, rows);
    for (size_t number = 0; number < seen.size(); ++number) {
      const Piece of = piece(int64_t(number));
      of.first ? void(batch[of.row].state = seen[number].state) : kernels_.merge(batch[of.row], seen[number]);
    }
    for (int64_t i = 0; i < rows; ++i) batch[i].state.label = rows_.label_logit(batch[i]);
  }
  void look_again_in_pieces(std::vector<DivergenceRow>& batch, int64_t rows) const {
    const std::vector<DivergenceRow> seen = seen_in_pieces(kernels_.look_again, batch, rows);
    for (size_t number = 0; number < seen.size(); ++number) {
      const Piece of = piece(int64_t(number));
      RowState<double>& state = batch[of.row].state;
      state.moment_t = seen[number].state.moment_t + (of.first ? 0 : state.moment_t);
      state.moment_s = seen[number].state.moment_s + (of.first ? 0 : state.moment_s);
    }
  }
  RowLoss few_wide_rows() const {
    std::vector<DivergenceRow> batch(rows_.count);
    std::vector<int64_t> index(rows_.count);
    std::vector<TopkEntry> entries(rows_.count * rows_.entries());
    const int64_t n = gather(0, rows_.count, batch.data(), index.data(), entries.data());
    if (looks_) look_in_pieces(batch, n);
    if (looks_again_) look_again_in_pieces(batch, n);
    for (int64_t i = 0; i < n; ++i) kernels_.finish(shape_, batch[i]);
    if (writes_gradient_) {
      parallel_for(0, n * pieces_per_row(), 1, [&](int64_t begin, int64_t end) {
        for (int64_t number = begin; number < end; ++number) {
          const Piece of = piece(number);
          kernels_.gradient(shape_, batch[of.row], of.begin, of.end);
        }
      });
    }
    return finish_all(batch.data(), index.data(), n);
  }

  const Rows& rows_;
  const DivergenceKernels& kernels_;
  const DivergenceShape& shape_;
  Known known_;
  bool looks_, looks_again_, writes_gradient_;
  Start start_;
  Finish finish_;
};

void write_state(const Reals& to, int64_t row, const RowState<double>& s) {
  const double values[kRowStateSize] = {s.max_s,    s.sum_s,   s.max_t, s.sum_t, s.moment_t,
                                        s.moment_s, s.sum_one, s.total, s.label};
  for (int i = 0; i < kRowStateSize; ++i) to.set(row * kRowStateSize + i, values[i]);
}
RowState<double> read_state(const Reals& from, int64_t row) {
  auto at = [&](int i) { return from.get(row * kRowStateSize + i); };
  return {at(0), at(1), at(2), at(3), at(4), at(5), at(6), at(7), at(8)};
}

// `into`: where the gradient goes, if not into memory of its own.
std::tuple<Tensor, Tensor, Tensor> forward(const DivergenceCall& call, const std::optional<Tensor>& given, Known known,
                                           Save save, const Tensor* into) {
  call.check();
  call.check_given(given, known);
  if (into) call.check_gradient(*into);
  const ScalarType real = call.loss_type();
  const Tensor& like = call.student;
  const bool per_row = call.per_row;
  Tensor loss = zeros(like, call.loss_sizes(), real), components = zeros(like, call.component_sizes(), real);
  Tensor saved = into                     ? *into
                 : save == Save::gradient ? empty_gradient(like)
                 : save == Save::state    ? zeros(like, call.leading_sizes_and(kRowStateSize), real)
                                          : zeros(like, {0}, real);
  const Rows rows(call, save == Save::gradient ? &saved : nullptr, 1.0, save == Save::state);
  if (call.vocabulary == 0) {  // of a shard without columns the rest still has a loss
    for (int64_t row = 0; row < rows.count; ++row) rows.clear_gradient(row, 0);
    return {loss, components, saved};
  }
  const bool is_double = call.is_double();
  const Reals losses(loss, is_double), parts(components, is_double), states(saved, is_double);
  const Reals known_states(known == Known::nothing ? saved : *given, is_double);
  auto set_loss = [&](int64_t i, const RowLoss& row) {
    losses.set(i, rows.total(row));
    if (!call.distillation) return;
    parts.set(2 * i, row.divergence);
    parts.set(2 * i + 1, row.cross_entropy);
  };
  const Driver driver(
      rows, known,
      [&](int64_t row, DivergenceRow& r) {
        if (known != Known::nothing) r.state = read_state(known_states, row);
      },
      [&](int64_t row, const DivergenceRow& r) {
        const RowLoss value = rows.loss(r);
        if (per_row) set_loss(row, value);
        if (save == Save::state) write_state(states, row, r.state);
        return value;
      });
  const RowLoss sum = driver.run();
  if (!per_row) set_loss(0, sum);
  return {loss, components, saved};
}

Tensor backward(const DivergenceCall& call, const Tensor& grad_loss, const Tensor& state) {
  call.check();
  call.check_state(state);
  call.check_upstream(grad_loss);
  Tensor gradient = empty_gradient(call.student);
  const Reals upstream(grad_loss, call.is_double()), states(state, call.is_double());
  const Rows rows(call, &gradient, call.per_row ? 1.0 : upstream.get(0), false);
  const RowOffsets offsets = call.per_row ? call.offsets_of(grad_loss, "grad_loss") : RowOffsets{};
  const Driver driver(
      rows, Known::everything,
      [&](int64_t row, DivergenceRow& r) {
        r.state = read_state(states, row);
        if (call.per_row) Rows::scale(r, upstream.get(offsets(row)));
      },
      [](int64_t, const DivergenceRow&) { return RowLoss{}; });
  driver.run();
  return gradient;
}

// Every row's state merged with one of these maxima that has seen nothing.
Tensor divergence_referred(Tensor state, Tensor maxima, std::optional<Tensor> row_temperature, int64_t kind,
                           double temperature) {
  const StatesCall call{state, maxima, row_temperature, kind, temperature};
  call.check();
  const std::vector<int64_t> sizes(state.sizes().begin(), state.sizes().end());
  const Tensor result = torch::stable::new_empty(state, sizes, state.scalar_type());
  const int64_t rows = call.rows();
  const Reals from(state, call.is_double()), most(maxima, call.is_double()), to(result, call.is_double());
  const RowInput temperatures = call.temperatures();
  const auto merge = cpu_variant().kernels->divergence[kind].merge;
  for (int64_t row = 0; row < rows; ++row) {
    DivergenceRow r = {}, other = {};
    r.state = read_state(from, row);
    const double own = row_temperature ? Reals(*row_temperature, call.is_double()).get(temperatures.offsets(row)) : 0;
    r.k = kLog2e / (row_temperature ? own : temperature);
    other.state = no_columns<double>();
    other.state.max_s = most.get(row);
    other.state.max_t = most.get(rows + row);
    merge(r, other);
    write_state(to, row, r.state);
  }
  return result;
}

using Ops = DivergenceOps<forward, backward>;

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(kdfast, CPU, m) {
  m.impl("divergence", TORCH_BOX(&Ops::divergence));
  m.impl("divergence_into", TORCH_BOX(&Ops::divergence_into));
  m.impl("divergence_backward", TORCH_BOX(&Ops::divergence_backward));
  m.impl("divergence_referred", TORCH_BOX(&divergence_referred));
}

}  // namespace kdfast
