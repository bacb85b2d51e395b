#include "optim/state_stream.h"

#include <algorithm>
#include <array>
#include <memory>

namespace weft::optim {
namespace {

constexpr int kBuffers = 3;
/// Tensors begin where vector loads may.
constexpr int64_t kAlignment = 64;

/// Elements [begin, end) of one of the host's arrays.
struct Range {
  int64_t begin = 0, end = 0;
  int64_t size() const { return end - begin; }
  void cover(int64_t from, int64_t count) {
    if (size() == 0) begin = from;
    end = from + count;
  }
};

}  // namespace

struct StateStream::Piece {
  Range moments, masters;
  std::vector<Part> parts;  // state still on the host
};

StateStream::StateStream(Device device, DType dtype, std::span<const Wanted> wanted, int64_t piece)
    : device_(device), dtype_(dtype) {
  const int64_t step = kAlignment / size_of(dtype);
  const auto aligned = [step](int64_t count) { return (count + step - 1) / step * step; };
  piece_ = aligned(piece);
  int64_t moments = 0, masters = 0;
  for (const Wanted& each : wanted) {
    moments += aligned(numel(each.shape));
    if (each.master) masters += aligned(numel(each.shape));
  }
  moments_ = Tensor::pinned({2, moments}, dtype, device);
  masters_ = Tensor::pinned({masters}, dtype, device);
  // The host is about to write where a copy for an earlier owner of the memory may still be reading.
  if (!DryRun::active()) backend(device).synchronize();
  moments_.zero_();
  int64_t moment = 0, master = 0;
  for (const Wanted& each : wanted) {
    const int64_t count = numel(each.shape);
    const auto part = [&](const Tensor& of, int64_t from) {
      return Tensor::make_view(of, each.shape, contiguous_strides(each.shape), from);
    };
    slots_.push_back(
        {part(moments_, moment), part(moments_, moments + moment), each.master ? part(masters_, master) : Tensor()});
    moment += aligned(count);
    if (each.master) master += aligned(count);
  }
}

std::vector<StateStream::Piece> StateStream::pieces(std::span<const Job> jobs) const {
  std::vector<Piece> all(1);
  const auto place = [this](const Tensor& in, const void* state) {
    return (static_cast<const char*>(state) - static_cast<const char*>(in.raw())) / size_of(dtype_);
  };
  for (size_t j = 0; j < jobs.size(); ++j) {
    const AdamTensor& tensor = jobs[j].tensor;
    const int64_t first = place(moments_, tensor.exp_avg);
    const bool master = tensor.weight != tensor.parameter;
    for (int64_t begin = 0; begin < tensor.count;) {
      const int64_t used = all.back().parts.empty() ? 0 : first + begin - all.back().moments.begin;
      int64_t count = std::min(tensor.count - begin, piece_ - used);
      if (jobs[j].whole) count = used == 0 || tensor.count <= piece_ - used ? tensor.count : 0;
      if (count <= 0) {
        all.emplace_back();
        continue;
      }
      Piece& piece = all.back();
      piece.moments.cover(first + begin, count);
      if (master) piece.masters.cover(place(masters_, tensor.weight) + begin, count);
      piece.parts.push_back({j, begin, tensor});
      piece.parts.back().tensor.count = count;
      begin += count;
    }
  }
  if (all.back().parts.empty()) all.pop_back();
  return all;
}

void StateStream::run(std::span<const Job> jobs, Changes changes,
                      const std::function<void(std::span<const Part>)>& update) const {
  using Direction = Backend::Direction;
  std::vector<Piece> all = pieces(jobs);
  Range largest, largest_master;
  for (const Piece& piece : all) {
    largest.end = std::max(largest.end, piece.moments.size());
    largest_master.end = std::max(largest_master.end, piece.masters.size());
  }
  const auto buffers = std::min<int64_t>(kBuffers, static_cast<int64_t>(all.size()));
  const Tensor moments = Tensor::empty({buffers, 2, largest.size()}, dtype_, device_);
  const Tensor masters = Tensor::empty({buffers, largest_master.size()}, dtype_, device_);
  if (DryRun::active() || all.empty()) return;

  Backend& on = backend(device_);
  const int64_t size = size_of(dtype_), row = moments_.size(1);
  /// The arrays of a piece: where they lie on the host and on the device.
  struct Array {
    char *host, *device;
    int64_t bytes;
  };
  const auto arrays = [&](size_t i) {
    const int64_t buffer = static_cast<int64_t>(i) % buffers;
    const auto at = [size](const Tensor& tensor, int64_t element) {
      return static_cast<char*>(tensor.raw()) + element * size;
    };
    const auto& [own, master, parts] = all[i];
    return std::array<Array, 3>{
        Array{at(moments_, own.begin), at(moments, 2 * buffer * largest.size()), own.size() * size},
        Array{at(moments_, row + own.begin), at(moments, (2 * buffer + 1) * largest.size()), own.size() * size},
        Array{at(masters_, master.begin), at(masters, buffer * largest_master.size()), master.size() * size}};
  };
  std::array<std::shared_ptr<Backend::Event>, kBuffers> in, out;  // of the last piece in each buffer
  const auto copy_in = [&](size_t i) {
    if (i >= all.size()) return;
    const size_t buffer = i % kBuffers;
    for (const Array& each : arrays(i)) {
      if (each.bytes == 0) continue;
      in[buffer] = on.copy_async(each.device, each.host, static_cast<size_t>(each.bytes), Direction::kToDevice,
                                 out[buffer].get());
    }
  };
  copy_in(0);
  for (size_t i = 0; i < all.size(); ++i) {
    copy_in(i + 1);
    on.wait(*in[i % kBuffers]);
    const std::array<Array, 3> own = arrays(i);
    for (Part& part : all[i].parts) {
      AdamTensor& t = part.tensor;
      const auto moved = [&](const Array& array, const void* state) {
        return array.device + (static_cast<const char*>(state) - array.host) + part.begin * size;
      };
      const int64_t skipped = part.begin * size_of(t.dtype);
      const bool master = t.weight != t.parameter;
      t.exp_avg = moved(own[0], t.exp_avg), t.exp_avg_sq = moved(own[1], t.exp_avg_sq);
      t.gradient = static_cast<const char*>(t.gradient) + skipped;
      t.parameter = static_cast<char*>(t.parameter) + skipped;
      t.weight = master ? moved(own[2], t.weight) : t.parameter;
    }
    update(all[i].parts);
    for (size_t a = changes == Changes::kAll ? 0 : 2; a < own.size(); ++a) {
      if (own[a].bytes == 0) continue;
      out[i % kBuffers] =
          on.copy_async(own[a].host, own[a].device, static_cast<size_t>(own[a].bytes), Direction::kToHost);
    }
  }
  on.synchronize();  // the buffers go back to the allocator, and the host may read the state
}

}  // namespace weft::optim
