// Sparse products for CPU, called by XLA without a copy (jax.ffi).
//
// The code of a batch is given by its entries, row after row: `values` and `latents` of each, and in `starts`
// where each row begins, the last of them being how many entries there are. Arrays of entries are longer than
// that: what lies behind is not read. Every number of a result is summed up by one thread in the order of the
// entries, so that results do not depend on the number of threads.
//
// crosscoder_jax/sparsity/entries.py has the same functions in plain JAX, which say what is meant.

#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <functional>
#include <memory>
#include <string>
#include <thread>
#include <vector>

#include "xla/ffi/api/ffi.h"

namespace ffi = xla::ffi;

// One file runs on all x86 processors, and on each with the widest registers it has.
#if defined(__x86_64__) && defined(__GNUC__) && !defined(__clang__) && defined(__linux__)
#define WIDEST __attribute__((target_clones("arch=x86-64-v4", "arch=x86-64-v3", "default")))
#else
#define WIDEST
#endif

namespace {

using Floats = ffi::Buffer<ffi::F32>;
using Ints = ffi::Buffer<ffi::S32>;

// Run work(0) ... work(number - 1) on the threads of XLA. The caller takes part and waits only for what another
// thread has begun, so that it cannot wait for ever where all threads are callers.
void in_parallel(ffi::ThreadPool& pool, int64_t number, std::function<void(int64_t)> work) {
  struct Shared {
    std::function<void(int64_t)> work;
    int64_t number;
    std::atomic<int64_t> next{0}, finished{0};
    void take() {
      for (int64_t i; (i = next.fetch_add(1)) < number;) {
        work(i);
        finished.fetch_add(1, std::memory_order_release);
      }
    }
  };
  auto shared = std::make_shared<Shared>();
  shared->work = std::move(work);
  shared->number = number;
  int64_t others = std::min<int64_t>(pool.num_threads(), number) - 1;
  for (int64_t i = 0; i < others; ++i) pool.Schedule([shared] { shared->take(); });
  shared->take();
  while (shared->finished.load(std::memory_order_acquire) < number) std::this_thread::yield();
}

// Split 0 ... size - 1 into ranges of `step` and run work(begin, end) of each.
void in_ranges(ffi::ThreadPool& pool, int64_t size, int64_t step,
               const std::function<void(int64_t, int64_t)>& work) {
  in_parallel(pool, (size + step - 1) / step, [&](int64_t i) {
    work(i * step, std::min(size, (i + 1) * step));
  });
}

constexpr int64_t kRows = 8;       // of a batch that a thread takes at once
constexpr int64_t kLatents = 64;   // of a dictionary that a thread takes at once
constexpr int64_t kLanes = 64;     // partial sums of a dot product

WIDEST int64_t count_reaching(const float* acts, const float* weights, float cut, int64_t size) {
  int32_t count = 0;
  for (int64_t i = 0; i < size; ++i) count += acts[i] * weights[i] >= cut;
  return count;
}

WIDEST void add_scaled(float* __restrict__ sum, const float* __restrict__ row, float scale, int64_t size) {
  for (int64_t i = 0; i < size; ++i) sum[i] += scale * row[i];
}

WIDEST float dot(const float* __restrict__ left, const float* __restrict__ right, int64_t size) {
  float lanes[kLanes] = {};
  int64_t i = 0;
  for (; i + kLanes <= size; i += kLanes)
    for (int64_t j = 0; j < kLanes; ++j) lanes[j] += left[i + j] * right[i + j];
  for (int64_t j = 0; i + j < size; ++j) lanes[j] += left[i + j] * right[i + j];
  for (int64_t half = kLanes / 2; half > 0; half /= 2)
    for (int64_t j = 0; j < half; ++j) lanes[j] += lanes[j + half];
  return lanes[0];
}

inline void fetch(const float* row) {
  for (int64_t i = 0; i < 4; ++i) __builtin_prefetch(row + 16 * i);
}

ffi::Error bad(const std::string& what) { return ffi::Error(ffi::ErrorCode::kInvalidArgument, what); }

// One entry that is no number, for scores that are infinite: the loss then tells of it.
ffi::Error one_nan(ffi::Result<Floats>& values, ffi::Result<Ints>& latents, ffi::Result<Ints>& starts) {
  std::fill_n(values->typed_data(), values->element_count(), 0.0f);
  std::fill_n(latents->typed_data(), latents->element_count(), 0);
  std::fill_n(starts->typed_data(), starts->element_count(), 1);
  values->typed_data()[0] = NAN;
  starts->typed_data()[0] = 0;
  return ffi::Error::Success();
}

// Entries of `pre_acts [batch, latent]` whose score, times `weights [latent]`, reaches `cut`, a positive number.
ffi::Error compress(ffi::ThreadPool pool, Floats pre_acts, Floats weights, Floats cut,
                    ffi::Result<Floats> values, ffi::Result<Ints> latents, ffi::Result<Ints> starts) {
  const int64_t batch = pre_acts.dimensions()[0], num_latents = pre_acts.dimensions()[1];
  const int64_t capacity = values->element_count();
  const float* acts = pre_acts.typed_data();
  const float* weight = weights.typed_data();
  const float least = *cut.typed_data();
  struct Part {
    std::vector<float> values;
    std::vector<int32_t> latents;
  };
  std::vector<Part> parts((batch + kRows - 1) / kRows);
  std::vector<int32_t> counts(batch);
  in_ranges(pool, batch, kRows, [&](int64_t begin, int64_t end) {
    Part& part = parts[begin / kRows];
    for (int64_t row = begin; row < end; ++row) {
      const int64_t before = part.values.size();
      for (int64_t from = 0; from < num_latents; from += kLanes) {
        const int64_t to = std::min(num_latents, from + kLanes);
        const float* of_row = acts + row * num_latents;
        if (!count_reaching(of_row + from, weight + from, least, to - from)) continue;
        for (int64_t latent = from; latent < to; ++latent) {
          if (!(of_row[latent] * weight[latent] >= least)) continue;
          part.values.push_back(of_row[latent]);
          part.latents.push_back(static_cast<int32_t>(latent));
        }
      }
      counts[row] = static_cast<int32_t>(part.values.size() - before);
    }
  });
  int32_t* start = starts->typed_data();
  int64_t total = 0;
  for (int64_t row = 0; row < batch; ++row) {
    start[row] = static_cast<int32_t>(total);
    total += counts[row];
    if (total > capacity && std::isinf(least)) return one_nan(values, latents, starts);
    if (total > capacity)
      return bad("more than " + std::to_string(capacity) +
                 " scores of a batch are kept, of which most are tied at the cut: many tokens or many latents "
                 "are equal to one another");
  }
  start[batch] = static_cast<int32_t>(total);
  in_parallel(pool, parts.size(), [&](int64_t i) {
    std::copy(parts[i].values.begin(), parts[i].values.end(), values->typed_data() + start[i * kRows]);
    std::copy(parts[i].latents.begin(), parts[i].latents.end(), latents->typed_data() + start[i * kRows]);
  });
  std::fill(values->typed_data() + total, values->typed_data() + capacity, 0.0f);
  std::fill(latents->typed_data() + total, latents->typed_data() + capacity, 0);
  return ffi::Error::Success();
}

// The entries in the order of their latents: which they are, their rows, and where each latent begins.
ffi::Error by_latent(Ints latents, Ints starts, ffi::Result<Ints> order, ffi::Result<Ints> rows,
                     ffi::Result<Ints> latent_starts) {
  const int64_t batch = starts.element_count() - 1, num_latents = latent_starts->element_count() - 1;
  const int32_t* latent = latents.typed_data();
  const int32_t* start = starts.typed_data();
  int32_t* first = latent_starts->typed_data();
  std::fill(first, first + num_latents + 1, 0);
  for (int32_t i = 0; i < start[batch]; ++i) ++first[latent[i] + 1];
  for (int64_t i = 0; i < num_latents; ++i) first[i + 1] += first[i];
  std::vector<int32_t> next(first, first + num_latents);
  for (int64_t row = 0; row < batch; ++row)
    for (int32_t i = start[row]; i < start[row + 1]; ++i) {
      const int32_t place = next[latent[i]]++;
      order->typed_data()[place] = i;
      rows->typed_data()[place] = static_cast<int32_t>(row);
    }
  std::fill(order->typed_data() + start[batch], order->typed_data() + order->element_count(), 0);
  std::fill(rows->typed_data() + start[batch], rows->typed_data() + rows->element_count(), 0);
  return ffi::Error::Success();
}

// [batch, width]: the sum of each row's entries times their rows of `w_dec [latent, width]`.
ffi::Error decode(ffi::ThreadPool pool, Floats values, Ints latents, Ints starts, Floats w_dec,
                  ffi::Result<Floats> recon) {
  const int64_t batch = starts.element_count() - 1, width = w_dec.dimensions()[1];
  const int32_t* latent = latents.typed_data();
  const int32_t* start = starts.typed_data();
  const float* decoder = w_dec.typed_data();
  in_ranges(pool, batch, kRows, [&](int64_t begin, int64_t end) {
    std::memset(recon->typed_data() + begin * width, 0, (end - begin) * width * sizeof(float));
    for (int64_t row = begin; row < end; ++row)
      for (int32_t i = start[row]; i < start[row + 1]; ++i) {
        if (i + 1 < start[batch]) fetch(decoder + latent[i + 1] * width);
        add_scaled(recon->typed_data() + row * width, decoder + latent[i] * width, values.typed_data()[i], width);
      }
  });
  return ffi::Error::Success();
}

// Of each entry the product of its row of `grad [batch, width]` and its latent's of `w_dec [latent, width]`.
ffi::Error value_gradient(ffi::ThreadPool pool, Ints latents, Ints starts, Floats grad, Floats w_dec,
                          ffi::Result<Floats> of_values) {
  const int64_t batch = starts.element_count() - 1, width = w_dec.dimensions()[1];
  const int32_t* latent = latents.typed_data();
  const int32_t* start = starts.typed_data();
  const float* decoder = w_dec.typed_data();
  float* found = of_values->typed_data();
  in_ranges(pool, batch, kRows, [&](int64_t begin, int64_t end) {
    for (int64_t row = begin; row < end; ++row)
      for (int32_t i = start[row]; i < start[row + 1]; ++i) {
        if (i + 1 < start[batch]) fetch(decoder + latent[i + 1] * width);
        found[i] = dot(grad.typed_data() + row * width, decoder + latent[i] * width, width);
      }
  });
  std::fill(found + start[batch], found + of_values->element_count(), 0.0f);
  return ffi::Error::Success();
}

// The sum of each latent's entries of `values` times their rows of `acts [batch, width]`, into `sum`.
void add_entries(float* sum, const float* values, const int32_t* order, const int32_t* rows, int32_t begin,
                 int32_t end, const float* acts, int64_t width) {
  std::memset(sum, 0, width * sizeof(float));
  for (int32_t i = begin; i < end; ++i) {
    if (i + 1 < end) fetch(acts + rows[i + 1] * width);
    add_scaled(sum, acts + rows[i] * width, values[order[i]], width);
  }
}

// [latent, width], the gradient of a decoder: each latent's entries times their rows of `grad [batch, width]`.
ffi::Error decoder_gradient(ffi::ThreadPool pool, Floats values, Ints order, Ints rows, Ints latent_starts,
                            Floats grad, ffi::Result<Floats> of_decoder) {
  const int64_t num_latents = of_decoder->dimensions()[0], width = of_decoder->dimensions()[1];
  const int32_t* start = latent_starts.typed_data();
  in_ranges(pool, num_latents, kLatents, [&](int64_t begin, int64_t end) {
    for (int64_t latent = begin; latent < end; ++latent)
      add_entries(of_decoder->typed_data() + latent * width, values.typed_data(), order.typed_data(),
                  rows.typed_data(), start[latent], start[latent + 1], grad.typed_data(), width);
  });
  return ffi::Error::Success();
}

// Columns of some latents, found as rows, into `[width, latent]`: a cache line of each row at a time.
WIDEST void write_columns(float* __restrict__ columns, const float* __restrict__ found, int64_t number,
                          int64_t width, int64_t num_latents) {
  for (int64_t w = 0; w < width; ++w)
    for (int64_t j = 0; j < number; ++j) columns[w * num_latents + j] = found[j * width + w];
}

// [width, latent] and [latent], the gradients of an encoder and of its bias: each latent's entries times their
// rows of `acts [batch, width]`, and alone.
ffi::Error encoder_gradient(ffi::ThreadPool pool, Floats values, Ints order, Ints rows, Ints latent_starts,
                            Floats acts, ffi::Result<Floats> of_encoder, ffi::Result<Floats> of_bias) {
  const int64_t width = of_encoder->dimensions()[0], num_latents = of_encoder->dimensions()[1];
  const int32_t* start = latent_starts.typed_data();
  constexpr int64_t kLine = 16;
  in_ranges(pool, num_latents, kLatents, [&](int64_t begin, int64_t end) {
    std::vector<float> found(kLine * width);
    for (int64_t from = begin; from < end; from += kLine) {
      const int64_t number = std::min(kLine, end - from);
      for (int64_t j = 0; j < number; ++j) {
        const int64_t latent = from + j;
        add_entries(found.data() + j * width, values.typed_data(), order.typed_data(), rows.typed_data(),
                    start[latent], start[latent + 1], acts.typed_data(), width);
        float sum = 0;
        for (int32_t i = start[latent]; i < start[latent + 1]; ++i)
          sum += values.typed_data()[order.typed_data()[i]];
        of_bias->typed_data()[latent] = sum;
      }
      write_columns(of_encoder->typed_data() + from, found.data(), number, width, num_latents);
    }
  });
  return ffi::Error::Success();
}

}  // namespace

XLA_FFI_DEFINE_HANDLER_SYMBOL(crosscoder_compress, compress,
                              ffi::Ffi::Bind()
                                  .Ctx<ffi::ThreadPool>()
                                  .Arg<Floats>()
                                  .Arg<Floats>()
                                  .Arg<Floats>()
                                  .Ret<Floats>()
                                  .Ret<Ints>()
                                  .Ret<Ints>());

XLA_FFI_DEFINE_HANDLER_SYMBOL(
    crosscoder_by_latent, by_latent,
    ffi::Ffi::Bind().Arg<Ints>().Arg<Ints>().Ret<Ints>().Ret<Ints>().Ret<Ints>());

XLA_FFI_DEFINE_HANDLER_SYMBOL(crosscoder_decode, decode,
                              ffi::Ffi::Bind()
                                  .Ctx<ffi::ThreadPool>()
                                  .Arg<Floats>()
                                  .Arg<Ints>()
                                  .Arg<Ints>()
                                  .Arg<Floats>()
                                  .Ret<Floats>());

XLA_FFI_DEFINE_HANDLER_SYMBOL(crosscoder_value_gradient, value_gradient,
                              ffi::Ffi::Bind()
                                  .Ctx<ffi::ThreadPool>()
                                  .Arg<Ints>()
                                  .Arg<Ints>()
                                  .Arg<Floats>()
                                  .Arg<Floats>()
                                  .Ret<Floats>());

XLA_FFI_DEFINE_HANDLER_SYMBOL(crosscoder_decoder_gradient, decoder_gradient,
                              ffi::Ffi::Bind()
                                  .Ctx<ffi::ThreadPool>()
                                  .Arg<Floats>()
                                  .Arg<Ints>()
                                  .Arg<Ints>()
                                  .Arg<Ints>()
                                  .Arg<Floats>()
                                  .Ret<Floats>());

XLA_FFI_DEFINE_HANDLER_SYMBOL(crosscoder_encoder_gradient, encoder_gradient,
                              ffi::Ffi::Bind()
                                  .Ctx<ffi::ThreadPool>()
                                  .Arg<Floats>()
                                  .Arg<Ints>()
                                  .Arg<Ints>()
                                  .Arg<Ints>()
                                  .Arg<Floats>()
                                  .Ret<Floats>()
                                  .Ret<Floats>());
