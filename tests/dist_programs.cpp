#include "tests/dist_programs.h"

#include <cmath>
#include <cstring>
#include <limits>
#include <numeric>
#include <random>
#include <stdexcept>
#include <vector>

#include "core/random.h"
#include "dist/mesh.h"

namespace weft::dist::testing {
namespace {

constexpr DType kReduced[] = {DType::f32, DType::f64, DType::bf16, DType::f16, DType::i32, DType::i64, DType::u8};
constexpr DType kMovedOnly[] = {DType::boolean, DType::i8, DType::f8e4m3, DType::f8e5m2};

class Digest {
 public:
  void add(const Tensor& t) {
    const auto* bytes = static_cast<const unsigned char*>(t.raw());
    for (int64_t i = 0; i < t.numel() * size_of(t.dtype()); ++i) hash_ = (hash_ ^ bytes[i]) * 1099511628211u;
  }
  uint64_t value() const { return hash_; }

 private:
  uint64_t hash_ = 14695981039346656037u;
};

/// Compares bits.
void expect_same(const Tensor& got, const Tensor& want, const std::string& what, Digest& digest) {
  if (!(got.shape() == want.shape()) || got.dtype() != want.dtype()) {
    throw std::runtime_error(concat(what, ": got ", got.describe(), ", want ", want.describe()));
  }
  const auto each = static_cast<size_t>(size_of(got.dtype()));
  const auto *a = static_cast<const char*>(got.raw()), *b = static_cast<const char*>(want.raw());
  for (int64_t i = 0; i < got.numel(); ++i) {
    if (std::memcmp(a + static_cast<size_t>(i) * each, b + static_cast<size_t>(i) * each, each) != 0) {
      throw std::runtime_error(concat(what, ": element ", i, " of ", got.describe(), " is ",
                                      got.reshape({-1}).slice(0, i, i + 1).to(DType::f64).item(), ", want ",
                                      want.reshape({-1}).slice(0, i, i + 1).to(DType::f64).item()));
    }
  }
  digest.add(got);
}

/// The order of summation as it is documented, level by level: neighbours in pairs, a last one without a partner as it
/// is.
template <class T, class A, class Combine>
Tensor reference(const std::vector<Tensor>& inputs, Combine combine, double divisor) {
  const Tensor out = Tensor::empty_like(inputs[0]);
  T* const result = out.data<T>();
  std::vector<const T*> from;
  for (const Tensor& input : inputs) from.push_back(input.data<T>());
  std::vector<A> level(inputs.size());
  for (int64_t i = 0; i < out.numel(); ++i) {
    for (size_t j = 0; j < from.size(); ++j) level[j] = static_cast<A>(from[j][i]);
    for (size_t left = level.size(); left > 1; left = (left + 1) / 2) {
      for (size_t j = 0; j < left; j += 2) level[j / 2] = j + 1 < left ? combine(level[j], level[j + 1]) : level[j];
    }
    result[i] = T(divisor == 1 ? level[0] : static_cast<A>(level[0] / static_cast<A>(divisor)));
  }
  return out;
}

template <class T, class A>
Tensor reference(const std::vector<Tensor>& inputs, Reduction reduction) {
  const auto add = [](A a, A b) {
    if constexpr (std::is_integral_v<A>) {
      return static_cast<A>(static_cast<std::make_unsigned_t<A>>(a) + static_cast<std::make_unsigned_t<A>>(b));
    } else {
      return a + b;
    }
  };
  const auto extreme = [&](A a, A b) {
    if (a != a) return a;
    if (b != b) return b;
    return (reduction == Reduction::max ? a < b : b < a) ? b : a;
  };
  if (reduction == Reduction::max || reduction == Reduction::min) return reference<T, A>(inputs, extreme, 1);
  return reference<T, A>(inputs, add, reduction == Reduction::avg ? static_cast<double>(inputs.size()) : 1);
}

Tensor reference(const std::vector<Tensor>& inputs, Reduction reduction) {
  switch (inputs[0].dtype()) {
    case DType::f64:
      return reference<double, double>(inputs, reduction);
    case DType::f32:
      return reference<float, float>(inputs, reduction);
    case DType::f16:
      return reference<Half, float>(inputs, reduction);
    case DType::bf16:
      return reference<BFloat16, float>(inputs, reduction);
    case DType::i32:
      return reference<int32_t, int32_t>(inputs, reduction);
    case DType::i64:
      return reference<int64_t, int64_t>(inputs, reduction);
    default:
      return reference<uint8_t, uint8_t>(inputs, reduction);
  }
}

/// What all ranks bring.
std::vector<Tensor> all_values(const Group& group, const Shape& shape, DType dtype, uint64_t seed) {
  std::vector<Tensor> out;
  for (const int rank : group.world_ranks()) out.push_back(values(rank, shape, dtype, seed));
  return out;
}

/// Rows for each rank: some none, none alike.
Counts uneven(int n, uint64_t seed) {
  Counts counts;
  for (int r = 0; r < n; ++r) counts.push_back(static_cast<int64_t>((seed + static_cast<uint64_t>(r) * 7) % 5));
  return counts;
}

int64_t total(const Counts& counts) { return std::accumulate(counts.begin(), counts.end(), int64_t{0}); }

bool power_of_two(int n) { return (n & (n - 1)) == 0; }

std::vector<Reduction> reductions(DType dtype, int n) {
  std::vector<Reduction> all = {Reduction::sum, Reduction::max, Reduction::min};
  if (is_float(dtype) && power_of_two(n)) all.push_back(Reduction::avg);
  return all;
}

void check_all_reduce(Group& group, const Shape& shape, DType dtype, Reduction reduction, uint64_t seed,
                      Digest& digest) {
  const std::vector<Tensor> all = all_values(group, shape, dtype, seed);
  const Tensor want = reference(all, reduction);
  const Tensor mine = all[static_cast<size_t>(group.rank())];
  const Tensor got = group.all_reduce(mine, reduction);
  const std::string what = concat("all_reduce of ", mine.describe(), ", ", name(reduction));
  expect_same(got, want, what, digest);
  expect_same(mine, values(group.world_ranks()[static_cast<size_t>(group.rank())], shape, dtype, seed),
              what + ": the input", digest);
  const Tensor in_place = mine.clone();
  group.all_reduce_(in_place, reduction);
  expect_same(in_place, want, what + " in place", digest);
}

void check_reduce_scatter(Group& group, const Counts& counts, int64_t row, DType dtype, Reduction reduction,
                          uint64_t seed, Digest& digest) {
  const std::vector<Tensor> all = all_values(group, {total(counts), row}, dtype, seed);
  const int64_t begin = total(Counts(counts.begin(), counts.begin() + group.rank()));
  const Tensor want =
      reference(all, reduction).narrow(0, begin, counts[static_cast<size_t>(group.rank())]).contiguous();
  const Tensor mine = all[static_cast<size_t>(group.rank())];
  expect_same(group.reduce_scatter(mine, reduction, counts), want,
              concat("reduce_scatter of ", mine.describe(), ", ", name(reduction)), digest);
}

void check_all_gather(Group& group, const Counts& counts, int64_t row, DType dtype, uint64_t seed, Digest& digest) {
  std::vector<Tensor> all;
  for (int r = 0; r < group.size(); ++r) {
    all.push_back(
        values(group.world_ranks()[static_cast<size_t>(r)], {counts[static_cast<size_t>(r)], row}, dtype, seed));
  }
  const Tensor want = cat(all), mine = all[static_cast<size_t>(group.rank())];
  expect_same(group.all_gather(mine, counts), want, concat("all_gather of ", mine.describe()), digest);
  const Tensor in_place = Tensor::zeros(want.shape(), dtype);
  const int64_t begin = total(Counts(counts.begin(), counts.begin() + group.rank()));
  if (mine.numel() > 0) in_place.narrow(0, begin, mine.size(0)).copy_(mine);
  group.all_gather_(in_place, counts);
  expect_same(in_place, want, concat("all_gather in place of ", mine.describe()), digest);
}

void check_broadcast(Group& group, const Shape& shape, DType dtype, int root, uint64_t seed, Digest& digest) {
  const std::vector<Tensor> all = all_values(group, shape, dtype, seed);
  const Tensor t = all[static_cast<size_t>(group.rank())].clone();
  group.broadcast_(t, root);
  expect_same(t, all[static_cast<size_t>(root)], concat("broadcast of ", t.describe(), " from ", root), digest);
}

/// Rank s sends (s + 2 r + seed) % 4 rows to rank r.
void check_all_to_all(Group& group, int64_t row, DType dtype, uint64_t seed, Digest& digest) {
  const int n = group.size();
  const auto rows = [&](int s, int r) { return static_cast<int64_t>((static_cast<uint64_t>(s + 2 * r) + seed) % 4); };
  std::vector<Tensor> received;
  Counts send, receive;
  for (int r = 0; r < n; ++r) send.push_back(rows(group.rank(), r)), receive.push_back(rows(r, group.rank()));
  for (int s = 0; s < n; ++s) {
    Counts theirs;
    for (int r = 0; r < n; ++r) theirs.push_back(rows(s, r));
    const Tensor t = values(group.world_ranks()[static_cast<size_t>(s)], {total(theirs), row}, dtype, seed);
    received.push_back(
        t.narrow(0, total(Counts(theirs.begin(), theirs.begin() + group.rank())), rows(s, group.rank())));
  }
  const Tensor mine = values(group.world_ranks()[static_cast<size_t>(group.rank())], {total(send), row}, dtype, seed);
  expect_same(group.all_to_all(mine, send, receive), cat(received), concat("all_to_all of ", mine.describe()), digest);
}

uint64_t every_op_dtype_and_size(Group& world) {
  Digest digest;
  const int n = world.size();
  uint64_t seed = 0;
  for (const DType dtype : kReduced) {
    for (const int64_t size : {0, 1, 2, 7, 1023}) {
      for (const Reduction reduction : reductions(dtype, n)) {
        check_all_reduce(world, {size}, dtype, reduction, ++seed, digest);
      }
      check_reduce_scatter(world, Counts(static_cast<size_t>(n), size), 3, dtype, Reduction::sum, ++seed, digest);
      check_all_gather(world, Counts(static_cast<size_t>(n), size), 1, dtype, ++seed, digest);
      check_broadcast(world, {size, 1}, dtype, static_cast<int>(seed % static_cast<uint64_t>(n)), seed, digest);
    }
    for (const int64_t row : {0, 1, 5}) {
      ++seed;
      check_reduce_scatter(world, uneven(n, seed), row, dtype, Reduction::max, seed, digest);
      check_all_gather(world, uneven(n, seed + 1), row, dtype, seed, digest);
      check_all_to_all(world, row, dtype, ++seed, digest);
    }
    check_all_reduce(world, {2, 3, 5}, dtype, Reduction::sum, ++seed, digest);
    check_all_reduce(world, {}, dtype, Reduction::sum, ++seed, digest);
  }
  for (const DType dtype : kMovedOnly) {
    ++seed;
    check_all_gather(world, uneven(n, seed), 3, dtype, seed, digest);
    check_broadcast(world, {11}, dtype, n - 1, ++seed, digest);
    check_all_to_all(world, 2, dtype, ++seed, digest);
  }
  world.barrier();
  return digest.value();
}

uint64_t large_tensors(Group& world) {
  Digest digest;
  // Several blocks of a reduction, several tasks of the pool, and no size that divides by anything.
  check_all_reduce(world, {1100009}, DType::f32, Reduction::sum, 1, digest);
  check_all_reduce(world, {200003}, DType::bf16, Reduction::sum, 2, digest);
  check_broadcast(world, {33367}, DType::f64, world.size() - 1, 3, digest);
  Counts counts(static_cast<size_t>(world.size()), 1);
  counts.back() = 50021;
  check_reduce_scatter(world, counts, 3, DType::f32, Reduction::sum, 4, digest);
  check_all_gather(world, counts, 3, DType::f16, 5, digest);
  check_all_to_all(world, 7001, DType::f32, 6, digest);
  return digest.value();
}

uint64_t special_values(Group& world) {
  Digest digest;
  const float inf = std::numeric_limits<float>::infinity(), nan = std::numeric_limits<float>::quiet_NaN();
  const std::vector<float> kinds = {nan, inf, -inf, 0.f, -0.f, 1.f, std::numeric_limits<float>::denorm_min(), 3e38f};
  std::vector<Tensor> all;
  for (int r = 0; r < world.size(); ++r) {
    std::vector<float> mine;
    for (size_t i = 0; i < 64; ++i) mine.push_back(kinds[(i + static_cast<size_t>(r) * (1 + i / 8)) % kinds.size()]);
    all.push_back(Tensor::from(mine, {64}));
  }
  for (const Reduction reduction : {Reduction::sum, Reduction::max, Reduction::min}) {
    const Tensor got = world.all_reduce(all[static_cast<size_t>(world.rank())], reduction);
    const Tensor want = reference(all, reduction);
    // Bits of a NaN are the processor's affair; whether there is one is not.
    const std::vector<float> a = got.to_vector<float>(), b = want.to_vector<float>();
    for (size_t i = 0; i < a.size(); ++i) {
      if (std::isnan(a[i]) != std::isnan(b[i]) ||
          (!std::isnan(a[i]) && std::memcmp(&a[i], &b[i], sizeof(float)) != 0)) {
        throw std::runtime_error(concat(name(reduction), " of special values: got ", a[i], ", want ", b[i]));
      }
    }
  }
  return digest.value();
}

uint64_t asynchronous_operations_overlap(Group& world) {
  Digest digest;
  std::vector<Tensor> tensors, wants;
  std::vector<Work> works;
  for (uint64_t i = 0; i < 40; ++i) {
    const Shape shape = {static_cast<int64_t>(1 + i * 37)};
    const std::vector<Tensor> all = all_values(world, shape, DType::f32, i);
    tensors.push_back(all[static_cast<size_t>(world.rank())].clone());
    wants.push_back(reference(all, Reduction::sum));
    works.push_back(world.all_reduce_async_(tensors.back()));
    // A call that waits comes after those under way.
    if (i % 16 == 7) check_all_gather(world, uneven(world.size(), i), 2, DType::i32, i, digest);
  }
  for (size_t i = works.size(); i-- > 0;) {
    works[i].wait();
    works[i].wait();
    if (!works[i].done()) throw std::runtime_error("an operation that was waited for is not done");
    expect_same(tensors[i], wants[i], concat("asynchronous all_reduce ", i), digest);
  }
  // All forms at once.
  const int n = world.size();
  const Tensor ones = Tensor::ones({n, 3});
  const Tensor sums = Tensor::empty({n, 3}), part = Tensor::empty({1, 3}), gathered = Tensor::empty({n * n, 3}),
               exchanged = Tensor::empty({n, 3}), sent = Tensor::full({5}, world.rank()), own = Tensor::zeros({n, 2});
  own.narrow(0, world.rank(), 1).fill_(world.rank() + 1);
  std::vector<Work> forms = {world.all_reduce_async(ones, sums),
                             world.reduce_scatter_async(ones, part),
                             world.all_gather_async(ones, gathered),
                             world.all_to_all_async(ones, exchanged),
                             world.broadcast_async_(sent, n - 1),
                             world.all_gather_async_(own),
                             world.barrier_async()};
  for (const Work& work : forms) work.wait();
  expect_same(sums, Tensor::full({n, 3}, n), "all_reduce_async", digest);
  expect_same(part, Tensor::full({1, 3}, n), "reduce_scatter_async", digest);
  expect_same(gathered, Tensor::ones({n * n, 3}), "all_gather_async", digest);
  expect_same(exchanged, Tensor::ones({n, 3}), "all_to_all_async", digest);
  expect_same(sent, Tensor::full({5}, n - 1), "broadcast_async_", digest);
  for (int r = 0; r < n; ++r) {
    expect_same(own.narrow(0, r, 1).contiguous(), Tensor::full({1, 2}, r + 1), "all_gather_async_", digest);
  }
  return digest.value();
}

uint64_t messages_between_two(Group& world) {
  Digest digest;
  const int n = world.size(), me = world.rank();
  if (n == 1) return digest.value();
  const int next = (me + 1) % n, previous = (me + n - 1) % n;
  // A ring: everyone sends and receives at the same time.
  for (const int64_t size : {0, 1, 1000, 300000}) {
    const Tensor mine = values(me, {size}, DType::f32, 1), got = Tensor::empty({size});
    const Work out = world.send_async(mine, next), in = world.recv_async_(got, previous);
    in.wait();
    out.wait();
    expect_same(got, values(previous, {size}, DType::f32, 1), "the ring", digest);
  }
  // Several under way between two, in order, while collectives go on.
  std::vector<Tensor> got;
  std::vector<Work> works;
  for (uint64_t i = 0; i < 10; ++i) {
    got.push_back(Tensor::empty({static_cast<int64_t>(i + 1)}, DType::i64));
    works.push_back(world.recv_async_(got.back(), previous));
  }
  check_all_reduce(world, {17}, DType::f32, Reduction::sum, 3, digest);
  for (uint64_t i = 0; i < 10; ++i) {
    works.push_back(world.send_async(values(me, {static_cast<int64_t>(i + 1)}, DType::i64, i), next));
  }
  for (const Work& work : works) work.wait();
  for (uint64_t i = 0; i < 10; ++i) {
    expect_same(got[i], values(previous, {static_cast<int64_t>(i + 1)}, DType::i64, i), "messages in order", digest);
  }
  // A pipeline: each waits for the one before.
  Tensor token = Tensor::zeros({1}, DType::i32);
  if (me > 0) world.recv_(token, me - 1);
  token.copy_(Tensor::full({1}, token.item() + me, DType::i32));
  if (me < n - 1) world.send(token, me + 1);
  if (token.item() != me * (me + 1) / 2) throw std::runtime_error("the pipeline lost a token");
  return digest.value();
}

uint64_t groups_of_a_mesh(Group& world) {
  Digest digest;
  const int n = world.size();
  for (int tp = 1; tp <= n; ++tp) {
    if (n % tp != 0) continue;
    const Mesh mesh({1, n / tp, 1, tp});
    const Axis tp_axis[] = {Axis::tp}, pp_axis[] = {Axis::pp}, both[] = {Axis::pp, Axis::tp};
    Group inner = world.subgroup(mesh, tp_axis), outer = world.subgroup(mesh, pp_axis),
          all = world.subgroup(mesh, both);
    if (inner.size() != tp || outer.size() != n / tp || all.size() != n) throw std::runtime_error("sizes of groups");
    for (uint64_t i = 0; i < 3; ++i) {
      // Both at once: different groups do not wait for each other.
      const auto mine = values(world.rank(), {100}, DType::f32, i);
      const Tensor a = mine.clone(), b = mine.clone();
      const Work first = inner.all_reduce_async_(a), second = outer.all_reduce_async_(b);
      second.wait();
      first.wait();
      expect_same(a, reference(all_values(inner, {100}, DType::f32, i), Reduction::sum), "the inner group", digest);
      expect_same(b, reference(all_values(outer, {100}, DType::f32, i), Reduction::sum), "the outer group", digest);
      check_all_gather(all, uneven(n, i), 3, DType::f32, i, digest);
    }
  }
  // Reversed: ranks of a group have the order that they are named in, and so have sums.
  std::vector<int> reversed(static_cast<size_t>(n));
  std::iota(reversed.rbegin(), reversed.rend(), 0);
  Group backwards = world.subgroup(reversed, "backwards");
  check_all_reduce(backwards, {50}, DType::f32, Reduction::sum, 9, digest);
  check_broadcast(backwards, {50}, DType::f32, 0, 9, digest);
  // A group within a group.
  if (n >= 3 && world.rank() != 1) {
    std::vector<int> others;
    for (int r = 0; r < n; ++r) {
      if (r != n - 2) others.push_back(r);  // all but world rank 1
    }
    Group part = backwards.subgroup(others, "part");
    check_all_reduce(part, {50}, DType::f32, Reduction::sum, 10, digest);
    check_all_to_all(part, 2, DType::f32, 11, digest);
  }
  return digest.value();
}

uint64_t random_sequences(Group& world) {
  Digest digest;
  std::mt19937 random(42);  // the same on all ranks
  const auto below = [&](uint64_t n) { return random() % n; };
  const int n = world.size();
  std::vector<int> low, all;
  for (int r = 0; r < n; ++r) {
    all.push_back(r);
    if (r <= n / 2) low.push_back(r);
  }
  Group everyone = world.subgroup(all, "everyone");
  std::optional<Group> half;
  if (world.rank() <= n / 2) half.emplace(world.subgroup(low, "half"));
  for (int step = 0; step < 150; ++step) {
    const uint64_t which = below(3), op = below(6), seed = random();
    const DType dtype = kReduced[below(std::size(kReduced))];
    const auto size = static_cast<int64_t>(below(4) == 0 ? below(3) : below(3000));
    const uint64_t pick = below(1000);
    if (which == 2 && !half) continue;
    Group& group = which == 0 ? world : which == 1 ? everyone : *half;
    const auto choices = reductions(dtype, group.size());
    const Reduction reduction = choices[pick % choices.size()];
    if (op == 0) check_all_reduce(group, {size}, dtype, reduction, seed, digest);
    if (op == 1) check_reduce_scatter(group, uneven(group.size(), seed), size % 50, dtype, reduction, seed, digest);
    if (op == 2) check_all_gather(group, uneven(group.size(), seed), size % 50, dtype, seed, digest);
    if (op == 3) check_broadcast(group, {size}, dtype, static_cast<int>(pick) % group.size(), seed, digest);
    if (op == 4) check_all_to_all(group, size % 50, dtype, seed, digest);
    if (op == 5) group.barrier();
  }
  return digest.value();
}

void expect_traffic(const Group& group, Collective op, int64_t calls, int64_t bytes) {
  const Group::Traffic got = group.traffic(op);
  if (got.calls != calls || got.bytes_sent != bytes) {
    throw std::runtime_error(concat(name(op), " on ", group.size(), " ranks: ", got.calls, " calls and ",
                                    got.bytes_sent, " bytes, want ", calls, " and ", bytes));
  }
}

uint64_t bytes_are_counted(Group& world) {
  const int n = world.size();
  const int64_t elements = 60060, bytes = elements * 4;  // divides by all numbers of ranks up to 7, and 8 by halves
  if (elements % n != 0) return 0;
  world.all_reduce_(Tensor::ones({elements}));
  expect_traffic(world, Collective::all_reduce, 1, 2 * bytes * (n - 1) / n);
  world.reduce_scatter(Tensor::ones({elements}));
  expect_traffic(world, Collective::reduce_scatter, 1, bytes * (n - 1) / n);
  world.all_gather(Tensor::ones({elements}));
  expect_traffic(world, Collective::all_gather, 1, bytes * (n - 1));
  world.all_to_all(Tensor::ones({elements}));
  expect_traffic(world, Collective::all_to_all, 1, bytes * (n - 1) / n);
  world.broadcast_(Tensor::ones({elements}), 0);
  expect_traffic(world, Collective::broadcast, 1,
                 n == 1              ? 0
                 : world.rank() == 0 ? 2 * bytes * (n - 1) / n
                                     : (n - 2) * bytes / n);
  world.broadcast_(Tensor::ones({10}), 0);
  const int64_t small = world.rank() == 0 ? 40 * (n - 1) : 0;
  expect_traffic(world, Collective::broadcast, 2,
                 small + (n == 1              ? 0
                          : world.rank() == 0 ? 2 * bytes * (n - 1) / n
                                              : (n - 2) * bytes / n));
  world.barrier();
  expect_traffic(world, Collective::barrier, 1, 0);
  if (n > 1) {
    if (world.rank() == 0) world.send(Tensor::ones({7}), 1);
    if (world.rank() == 1) world.recv_(Tensor::ones({7}), 0);
    expect_traffic(world, Collective::send, world.rank() == 0, world.rank() == 0 ? 28 : 0);
    expect_traffic(world, Collective::recv, world.rank() == 1, 0);
  }
  // Counts that differ: what is sent is what is not one's own.
  const Counts counts = uneven(n, 3);
  Group other = world.subgroup(Mesh({n, 1, 1, 1}), kAllAxes);
  other.reduce_scatter(Tensor::ones({total(counts), 5}), Reduction::sum, counts);
  const int64_t own = counts[static_cast<size_t>(world.rank())];
  expect_traffic(other, Collective::reduce_scatter, 1, (total(counts) - own) * 20);
  other.all_gather(Tensor::ones({own, 5}), counts);
  expect_traffic(other, Collective::all_gather, 1, own * 20 * (n - 1));
  expect_traffic(other, Collective::all_reduce, 0, 0);
  return 0;
}

constexpr Program kPrograms[] = {{"EveryOpDTypeAndSize", every_op_dtype_and_size},
                                 {"LargeTensors", large_tensors},
                                 {"SpecialValues", special_values},
                                 {"AsynchronousOperationsOverlap", asynchronous_operations_overlap},
                                 {"MessagesBetweenTwo", messages_between_two},
                                 {"GroupsOfAMesh", groups_of_a_mesh},
                                 {"RandomSequences", random_sequences},
                                 {"BytesAreCounted", bytes_are_counted}};

}  // namespace

std::span<const Program> programs() { return kPrograms; }

const Program& program(std::string_view name) {
  for (const Program& each : kPrograms) {
    if (name == each.name) return each;
  }
  throw std::runtime_error("no program is called " + std::string(name));
}

Tensor values(int rank, const Shape& shape, DType dtype, uint64_t seed) {
  const Tensor out = Tensor::empty(shape, dtype);
  std::mt19937_64 random(seed * 1000003 + static_cast<uint64_t>(rank));
  if (dtype == DType::boolean) {
    for (int64_t i = 0; i < out.numel(); ++i) out.data<bool>()[i] = random() & 1;
    return out;
  }
  if (!is_float(dtype) || size_of(dtype) == 1) {
    // Any bits: sums wrap around.
    auto* bytes = static_cast<unsigned char*>(out.raw());
    for (int64_t i = 0; i < out.numel() * size_of(dtype); ++i) bytes[i] = static_cast<unsigned char>(random());
    return out;
  }
  dispatch_float(dtype, "values", [&]<class T>() {
    T* data = out.data<T>();
    // Magnitudes far enough apart that another order of summation shows.
    for (int64_t i = 0; i < out.numel(); ++i) {
      const uint64_t bits = random();
      data[i] = T((static_cast<double>(bits >> 11) * 0x1p-53 - 0.5) * static_cast<double>(1 << (bits & 7)));
    }
  });
  return out;
}

}  // namespace weft::dist::testing
