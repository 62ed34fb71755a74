// Token-level scores of the text unit on a CPU, in float or double (see cpu.py for the interface, ../text_unit.py for
// the twin).
//
// For mention m with T keys and centred values and entity e with S queries:
//   p_t   = mean over s of softmax over t of (query_s . key_t)
//   c     = sum over t of p_t value_t
//   score = <direction_e, c / sqrt(mean c^2 + eps)>
//
// A mention's keys are packed once, transposed, so that vector lanes run over t: row 0 holds 0, or -inf in the lanes
// beyond T, row 1 + k the keys' channel k, scaled so that the softmax is one of powers of 2. Products of up to 8 query
// rows with up to 8 vectors of keys stay in registers. A pair is computed by one thread in an order that depends on its
// own T, S and d alone: results do not depend on tiles, threads or the other pairs. NaN goes through to the score.
#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <functional>
#include <iterator>
#include <limits>
#include <memory>
#include <new>
#include <system_error>
#include <thread>
#include <vector>

namespace {

#if defined(__AVX512F__)
constexpr int kBytes = 64;
#elif defined(__AVX__)
constexpr int kBytes = 32;
#else
constexpr int kBytes = 16;
#endif

constexpr int kAccumulators = 12;               // of one register tile: enough to hide the latency of multiply-add
constexpr std::int64_t kEntityBytes = 1 << 17;  // queries that stay in a core's cache while mentions pass
constexpr std::int64_t kMentions = 32;          // of one task

// What 2^x is made of: the number's bits, and a polynomial for 2^f, |f| <= 1/2, highest power first. `kMagic`: the last
// bits of a sum with it are the exponent's. What is below `kLeast` counts as that, which beside a sum of at least 1 is
// nothing; lower ones would make subnormal numbers of it, which are slow.
template <class Real>
struct Power;

template <>
struct Power<float> {  // relative error 2.4e-7
  typedef std::int32_t Bits;
  static constexpr int kFraction = 23;
  static constexpr float kLeast = -96.0f, kMagic = 12582912.0f + 127.0f;
  static constexpr float kPolynomial[] = {1.3276472e-3f, 9.6755419e-3f, 5.5507131e-2f,
                                          2.4022120e-1f, 6.9314694e-1f, 1.0000001f};
};

template <>
struct Power<double> {  // relative error about 2e-16: the series of 2^f, whose next term is below 1e-17
  typedef std::int64_t Bits;
  static constexpr int kFraction = 52;
  static constexpr double kLeast = -960.0, kMagic = 6755399441055744.0 + 1023.0;
  static constexpr double kPolynomial[] = {
      1.3691488853904128e-12, 2.5678435993488202e-11, 4.4455382718708114e-10, 7.054911620801123e-9,
      1.0178086009239699e-7,  1.3215486790144307e-6,  1.5252733804059841e-5,  1.5403530393381609e-4,
      1.3333558146428443e-3,  9.6181291076284772e-3,  5.5504108664821580e-2,  2.4022650695910072e-1,
      6.9314718055994531e-1,  1.0};
};

template <class Real>
struct TextUnit {
  static constexpr int kLanes = kBytes / sizeof(Real);
  typedef Real Vec __attribute__((vector_size(kBytes)));
  typedef typename Power<Real>::Bits Bits __attribute__((vector_size(kBytes)));

  static std::int64_t vectors(std::int64_t n) { return (n + kLanes - 1) / kLanes; }

  static Vec all(Real x) { return x - Vec{}; }

  static Real sum(Vec v) {
    Real x[kLanes];
    std::memcpy(x, &v, sizeof x);
    for (int half = kLanes / 2; half > 0; half /= 2)
      for (int l = 0; l < half; ++l) x[l] += x[l + half];
    return x[0];
  }

  static Real largest(Vec v) {
    Real x[kLanes];
    std::memcpy(x, &v, sizeof x);
    for (int half = kLanes / 2; half > 0; half /= 2)
      for (int l = 0; l < half; ++l) x[l] = x[l] < x[l + half] ? x[l + half] : x[l];
    return x[0];
  }

  // 2^x for x <= 0 as 2^n 2^f; NaN stays NaN.
  static Vec power_of_2(Vec x) {
    const Vec low = all(Power<Real>::kLeast), magic = all(Power<Real>::kMagic);
    x = x < low ? low : x;
    const Vec shifted = x + magic;
    const Vec f = x - (shifted - magic);
    Vec y = all(Power<Real>::kPolynomial[0]);
    for (const Real* c = std::begin(Power<Real>::kPolynomial) + 1; c != std::end(Power<Real>::kPolynomial); ++c)
      y = y * f + all(*c);
    return y * (Vec)((Bits)shifted << Power<Real>::kFraction);
  }

  // R rows of queries times C vectors of keys; `width` vectors in a row of keys and of logits. A function of its own:
  // where it was inlined, other code's constants took registers, and GCC kept a sum, or the keys, in memory.
  template <int R, int C>
  __attribute__((noinline)) static void product(const Real* query, std::int64_t d, const Vec* keys, std::int64_t width,
                                                Vec* logits) {
    Vec sums[R][C];
    for (int r = 0; r < R; ++r)
      for (int c = 0; c < C; ++c) sums[r][c] = keys[c];
    for (std::int64_t k = 0; k < d; ++k) {
      Vec key[C];
      for (int c = 0; c < C; ++c) key[c] = keys[(k + 1) * width + c];
      for (int r = 0; r < R; ++r) {
        const Vec q = all(query[r * d + k]);
        for (int c = 0; c < C; ++c) sums[r][c] += q * key[c];
      }
    }
    for (int r = 0; r < R; ++r)
      for (int c = 0; c < C; ++c) logits[r * width + c] = sums[r][c];
  }

  // All vectors of keys, as many at a time as registers hold, but no single one at the end, whose sums would wait for
  // themselves.
  template <int R, int C>
  static void products(const Real* query, std::int64_t d, const Vec* keys, std::int64_t width, std::int64_t left,
                       Vec* logits) {
    constexpr std::int64_t kOneMore = C > 2 ? C + 1 : 0;
    for (; left >= C && left != kOneMore; left -= C, keys += C, logits += C)
      product<R, C>(query, d, keys, width, logits);
    if constexpr (C > 1)
      if (left > 0) products<R, C - 1>(query, d, keys, width, left, logits);
  }

  // Adds the attention of R query rows, each times `share`, to `attention` [width]. Every step is one of all rows: what
  // one row alone waits for fills the time of the others.
  template <int R>
  static void attend(const Real* query, std::int64_t d, const Vec* keys, std::int64_t width, Real share, Vec* logits,
                     Vec* attention) {
    products<R, std::min(kAccumulators / R, 8)>(query, d, keys, width, width, logits);
    Vec top[R], total[R];
    for (int r = 0; r < R; ++r) top[r] = logits[r * width], total[r] = all(0);
    for (std::int64_t v = 1; v < width; ++v)
      for (int r = 0; r < R; ++r) top[r] = top[r] < logits[r * width + v] ? logits[r * width + v] : top[r];
    for (int r = 0; r < R; ++r) top[r] = all(largest(top[r]));
    for (std::int64_t v = 0; v < width; ++v)
      for (int r = 0; r < R; ++r) total[r] += logits[r * width + v] = power_of_2(logits[r * width + v] - top[r]);
    for (int r = 0; r < R; ++r) total[r] = all(share / sum(total[r]));
    for (std::int64_t v = 0; v < width; ++v) {
      Vec x = attention[v];
      for (int r = 0; r < R; ++r) x += total[r] * logits[r * width + v];
      attention[v] = x;
    }
  }

  // C vectors of the context: the attention over T tokens times their values.
  template <int C>
  static void gather(const Real* attention, std::int64_t tokens, const Vec* values, std::int64_t width, Vec* context) {
    Vec sums[C] = {};
    for (std::int64_t t = 0; t < tokens; ++t)
      for (int c = 0; c < C; ++c) sums[c] += all(attention[t]) * values[t * width + c];
    for (int c = 0; c < C; ++c) context[c] = sums[c];
  }

  struct Mention {
    std::int64_t tokens;
    const Vec* keys;    // [1 + d, vectors(tokens)]
    const Vec* values;  // [tokens, vectors(d)], centred
  };

  struct Lanes {  // a template's argument would lose the type's lanes
    Vec v;
  };
  typedef std::unique_ptr<Lanes[]> Buffer;

  static Vec* start(const Buffer& buffer) { return &buffer.get()->v; }

  struct Scratch {
    Buffer logits, attention, context;
  };

  static Real score(const Mention& mention, const Real* query, std::int64_t rows, const Vec* direction, std::int64_t d,
                    Real eps, Scratch& scratch) {
    if (mention.tokens == 0 || rows == 0) return std::numeric_limits<Real>::quiet_NaN();
    const std::int64_t width = vectors(mention.tokens), channels = vectors(d);
    Vec *logits = start(scratch.logits), *attention = start(scratch.attention), *context = start(scratch.context);
    std::fill_n(attention, width, all(0));
    const Real share = Real(1) / static_cast<Real>(rows);
    if (width == 1)  // few sums at a time would wait for themselves
      for (; rows >= 8; rows -= 8, query += 8 * d) attend<8>(query, d, mention.keys, width, share, logits, attention);
    for (; rows >= 4; rows -= 4, query += 4 * d) attend<4>(query, d, mention.keys, width, share, logits, attention);
    if (rows == 3) attend<3>(query, d, mention.keys, width, share, logits, attention);
    if (rows == 2) attend<2>(query, d, mention.keys, width, share, logits, attention);
    if (rows == 1) attend<1>(query, d, mention.keys, width, share, logits, attention);

    const Real* weights = reinterpret_cast<const Real*>(attention);
    std::int64_t c = 0;
    for (; c + 6 <= channels; c += 6) gather<6>(weights, mention.tokens, mention.values + c, channels, context + c);
    for (; c < channels; ++c) gather<1>(weights, mention.tokens, mention.values + c, channels, context + c);
    Vec squares = all(0), projection = all(0);
    for (c = 0; c < channels; ++c) {
      squares += context[c] * context[c];
      projection += context[c] * direction[c];
    }
    return sum(projection) / std::sqrt(sum(squares) / static_cast<Real>(d) + eps);
  }

  static void pack_keys(const Real* key, std::int64_t tokens, std::int64_t d, Vec* packed) {
    const std::int64_t lanes = vectors(tokens) * kLanes;
    Real* out = reinterpret_cast<Real*>(packed);
    std::fill_n(out, lanes * (d + 1), Real(0));
    std::fill_n(out + tokens, lanes - tokens, -std::numeric_limits<Real>::infinity());
    for (std::int64_t t = 0; t < tokens; ++t)
      for (std::int64_t k = 0; k < d; ++k)
        out[(k + 1) * lanes + t] = key[t * d + k] * Real(1.4426950408889634);  // 1 / ln 2
  }

  static void pack_values(const Real* value, std::int64_t tokens, std::int64_t d, Vec* packed) {
    const std::int64_t lanes = vectors(d) * kLanes;
    Real* out = reinterpret_cast<Real*>(packed);
    std::fill_n(out, lanes * tokens, Real(0));
    for (std::int64_t t = 0; t < tokens; ++t) {
      double mean = 0.0;
      for (std::int64_t k = 0; k < d; ++k) mean += value[t * d + k];
      mean /= static_cast<double>(d);
      for (std::int64_t k = 0; k < d; ++k) out[t * lanes + k] = static_cast<Real>(value[t * d + k] - mean);
    }
  }

  // Calls work(task, scratch) for every task; threads take the next one when they are free.
  template <class Work, class MakeScratch>
  static void in_parallel(std::int64_t num_tasks, int num_threads, MakeScratch make_scratch, Work work) {
    std::atomic<std::int64_t> next{0};
    const auto take = [&](Scratch& scratch) {
      for (std::int64_t task; (task = next++) < num_tasks;) work(task, scratch);
    };
    const auto count = std::max<std::int64_t>(1, std::min<std::int64_t>(num_threads, num_tasks));
    std::vector<Scratch> scratch(count);
    for (Scratch& each : scratch) make_scratch(each);
    std::vector<std::thread> threads;
    threads.reserve(count);
    for (std::int64_t i = 1; i < count; ++i) {
      try {
        threads.emplace_back(take, std::ref(scratch[i]));
      } catch (const std::system_error&) {
        break;  // no more threads to be had: those that run do the work
      }
    }
    take(scratch[0]);
    for (std::thread& thread : threads) thread.join();
  }

  static void run(const Real* key, const Real* value, const std::int64_t* key_start, const std::int64_t* value_start,
                  const std::int64_t* num_tokens, std::int64_t num_mentions, const Real* query,
                  const std::int64_t* query_start, const std::int64_t* num_rows, const Real* direction,
                  std::int64_t num_entities, std::int64_t d, Real eps, const std::uint8_t* wanted, int num_threads,
                  Real* scores) {
    const std::int64_t channels = vectors(d);
    std::int64_t size = 0, longest = 0;
    for (std::int64_t m = 0; m < num_mentions; ++m) {
      size += vectors(num_tokens[m]) * (d + 1) + num_tokens[m] * channels;
      longest = std::max(longest, num_tokens[m]);
    }
    const Buffer packed(new Lanes[size]), direction_rows(new Lanes[num_entities * channels]());
    std::vector<Mention> mentions;
    Vec *place = start(packed), *directions = start(direction_rows);
    for (std::int64_t m = 0; m < num_mentions; ++m) {
      Vec* values = place + vectors(num_tokens[m]) * (d + 1);
      pack_keys(key + key_start[m] * d, num_tokens[m], d, place);
      pack_values(value + value_start[m] * d, num_tokens[m], d, values);
      mentions.push_back({num_tokens[m], place, values});
      place = values + num_tokens[m] * channels;
    }
    for (std::int64_t e = 0; e < num_entities; ++e)
      std::memcpy(&directions[e * channels], direction + e * d, d * sizeof(Real));

    std::vector<std::int64_t> edges{0};  // of blocks of entities
    std::int64_t bytes = 0;
    for (std::int64_t e = 0; e < num_entities; ++e) {
      bytes += num_rows[e] * d * static_cast<std::int64_t>(sizeof(Real));
      if (bytes >= kEntityBytes || e + 1 == num_entities) edges.push_back(e + 1), bytes = 0;
    }
    const std::int64_t strips = (num_mentions + kMentions - 1) / kMentions;
    const auto make_scratch = [&](Scratch& scratch) {
      scratch.logits.reset(new Lanes[std::max<std::int64_t>(8, 4 * vectors(longest))]);
      scratch.attention.reset(new Lanes[vectors(longest)]);
      scratch.context.reset(new Lanes[channels]);
    };
    const auto block = [&](std::int64_t task, Scratch& scratch) {
      const std::int64_t first = task % strips * kMentions, last = std::min(first + kMentions, num_mentions);
      for (std::int64_t m = first; m < last; ++m)
        for (std::int64_t e = edges[task / strips]; e < edges[task / strips + 1]; ++e) {
          const std::int64_t pair = m * num_entities + e;
          const bool skip = wanted && !wanted[pair];
          scores[pair] = skip ? Real(0)
                              : score(mentions[m], query + query_start[e] * d, num_rows[e], &directions[e * channels],
                                      d, eps, scratch);
        }
    };
    in_parallel(static_cast<std::int64_t>(edges.size() - 1) * strips, num_threads, make_scratch, block);
  }
};

}  // namespace

// Numbers are floats, or doubles where `is_double`. Rows of keys and values [*, d] of mentions, of queries [*, d] of
// entities; direction [E, d]; wanted [M, E] or null; scores [M, E]. Returns 0, or 1 when memory does not suffice.
extern "C" int dsmip_text_unit(int is_double, const void* key, const void* value, const std::int64_t* key_start,
                               const std::int64_t* value_start, const std::int64_t* num_tokens,
                               std::int64_t num_mentions, const void* query, const std::int64_t* query_start,
                               const std::int64_t* num_rows, const void* direction, std::int64_t num_entities,
                               std::int64_t d, double eps, const std::uint8_t* wanted, int num_threads,
                               void* scores) try {
  const auto run = [&](auto zero) {
    using Real = decltype(zero);
    const auto of = [](const void* numbers) { return static_cast<const Real*>(numbers); };
    TextUnit<Real>::run(of(key), of(value), key_start, value_start, num_tokens, num_mentions, of(query), query_start,
                        num_rows, of(direction), num_entities, d, static_cast<Real>(eps), wanted, num_threads,
                        static_cast<Real*>(scores));
  };
  is_double ? run(0.0) : run(0.0f);
  return 0;
} catch (const std::bad_alloc&) {
  return 1;
}
