// Tensors of checkpoints: whether pieces make up a whole, and how any part is read out of them.
#include "models/checkpoint/tensors.h"

#include <algorithm>
#include <cstring>

#include "core/backend.h"
#include "models/checkpoint/pieces.h"

namespace weft {
namespace {

constexpr const char* kWhere = "load_checkpoint";

/// Elements [at, at + count) of the flattened whole are [from, from + count) of a part.
struct Run {
  int64_t at, from, count;
};

std::vector<Run> runs_of(const TensorPart& part) {
  std::vector<Run> runs;
  part.for_each_run([&](int64_t at, int64_t from, int64_t count) { runs.push_back({at, from, count}); });
  return runs;
}

/// Bytes of a file and where they go in the tensor that is loaded.
struct Copy {
  std::span<const std::byte> from;
  int64_t to;
};

/// Reading a C++ bool from any other byte is undefined behaviour.
void check_bools(std::span<const std::byte> bytes, const CheckpointTensor& tensor, const std::string& file) {
  const auto bad = std::find_if(bytes.begin(), bytes.end(), [](std::byte byte) { return byte > std::byte{1}; });
  if (bad == bytes.end()) return;
  fail(ErrorKind::kData, kWhere, file, ": tensor ", quoted(tensor.name), " is BOOL but holds the byte ",
       std::to_integer<int>(*bad), "; only 0 and 1 are allowed");
}

}  // namespace

namespace checkpoint {

TensorPart normalized(TensorPart part) {
  std::vector<IndexRange> ranges;
  for (const IndexRange& range : part.ranges) {
    if (range.count() == 0) continue;
    if (!ranges.empty() && ranges.back().end == range.begin) {
      ranges.back().end = range.end;
    } else {
      ranges.push_back(range);
    }
  }
  part.ranges = std::move(ranges);
  if (part.sliced() == part.whole) {
    const TensorPart all = TensorPart::all(part.whole);
    part.dim = all.dim, part.ranges = all.ranges;
  }
  return part;
}

std::string cover_problem(const CheckpointTensor& tensor) {
  const auto say = [&](const auto&... parts) {
    return concat("tensor ", quoted(tensor.name), ' ', tensor.dtype, ' ', tensor.shape, ": ", parts...);
  };
  const auto both = [](const CheckpointPiece& a, const CheckpointPiece& b) {
    return a.file == b.file ? concat("are in two pieces, of ", a.file)
                            : concat("are in two pieces, of ", a.file, " and of ", b.file);
  };
  const std::vector<CheckpointPiece>& pieces = tensor.pieces;
  if (pieces.empty()) return say("no file has it");
  const int64_t elements = numel(tensor.shape);
  if (elements == 0) {
    if (pieces.size() == 1 && pieces[0].part == TensorPart::all(tensor.shape)) return "";
    return say("it has no elements and must be one piece, all of it; it is ", pieces.size());
  }
  // Slices of the dimension that is cut, each with its pieces in order.
  std::vector<const CheckpointPiece*> order;
  for (const CheckpointPiece& piece : pieces) order.push_back(&piece);
  const auto key = [](const CheckpointPiece* piece) {
    std::vector<int64_t> flat;
    for (const IndexRange& range : piece->part.ranges) flat.insert(flat.end(), {range.begin, range.end});
    return flat;
  };
  std::sort(order.begin(), order.end(), [&](const CheckpointPiece* a, const CheckpointPiece* b) {
    const auto left = key(a), right = key(b);
    return left != right ? left < right : a->part.begin < b->part.begin;
  });
  std::vector<std::pair<IndexRange, const CheckpointPiece*>> slices;  // ranges and one of their pieces
  for (size_t i = 0; i < order.size();) {
    const TensorPart& slice = order[i]->part;
    if (slice.dim != pieces[0].part.dim) {
      return say("it is cut along dimension ", pieces[0].part.dim, " in ", pieces[0].file, " and along dimension ",
                 slice.dim, " in ", order[i]->file);
    }
    TensorPart all = slice;
    all.begin = 0, all.end = numel(slice.sliced());
    const auto missing = [&](int64_t begin, int64_t end) {
      return say("elements ", begin, " to ", end, " of ", describe(all), ": no file has them");
    };
    for (const IndexRange& range : slice.ranges) slices.emplace_back(range, order[i]);
    int64_t at = 0;
    for (; i < order.size() && order[i]->part.ranges == slice.ranges; ++i) {
      const TensorPart& part = order[i]->part;
      if (part.begin > at) return missing(at, part.begin);
      if (part.begin < at) {
        return say("elements ", part.begin, " to ", std::min(at, part.end), " of ", slice.sliced(), ' ',
                   both(*order[i - 1], *order[i]));
      }
      at = part.end;
    }
    if (at != all.end) return missing(at, all.end);
  }
  if (tensor.shape.rank() == 0) return "";
  std::sort(slices.begin(), slices.end(), [](const auto& a, const auto& b) { return a.first.begin < b.first.begin; });
  int64_t at = 0;
  const CheckpointPiece* before = nullptr;
  const int64_t dim = pieces[0].part.dim;
  for (const auto& [range, piece] : slices) {
    if (range.begin > at) return say("indices ", at, " to ", range.begin, " of dimension ", dim, ": no file has them");
    if (range.begin < at)
      return say("indices ", range.begin, " to ", std::min(at, range.end), " of dimension ", dim, ' ',
                 both(*before, *piece));
    at = range.end, before = piece;
  }
  const int64_t size = tensor.shape[static_cast<int>(dim)];
  return at == size ? "" : say("indices ", at, " to ", size, " of dimension ", dim, ": no file has them");
}

bool before(DType a, std::string_view a_name, DType b, std::string_view b_name) {
  return size_of(a) != size_of(b) ? size_of(a) > size_of(b) : a_name < b_name;
}

}  // namespace checkpoint

CheckpointTensors::CheckpointTensors(SafetensorsFile file) : source_(file.source()) {
  const std::string name = source_.substr(source_.find_last_of('/') + 1);
  for (const SafetensorsEntry& each : file.tensors()) {
    by_name_.emplace(each.name, tensors_.size());
    tensors_.push_back({each.name, each.dtype, each.shape, {{name, TensorPart::all(each.shape)}}});
  }
  files_.emplace(name, std::move(file));
}

CheckpointTensors::CheckpointTensors(std::vector<CheckpointTensor> tensors,
                                     std::map<std::string, SafetensorsFile> files, std::string source)
    : source_(std::move(source)), files_(std::move(files)), tensors_(std::move(tensors)) {
  std::map<std::string, size_t> pieces;
  for (size_t i = 0; i < tensors_.size(); ++i) {
    const CheckpointTensor& tensor = tensors_[i];
    by_name_.emplace(tensor.name, i);
    for (const CheckpointPiece& piece : tensor.pieces) {
      const SafetensorsFile& file = files_.at(piece.file);
      const SafetensorsEntry& entry = file.entry(tensor.name);
      ++pieces[piece.file];
      if (entry.dtype == tensor.dtype && entry.shape == piece.part.shape()) continue;
      fail(ErrorKind::kData, kWhere, file.source(), ": tensor ", quoted(tensor.name), " is ", entry.dtype, ' ',
           entry.shape, " but the manifest says ", tensor.dtype, ' ', piece.part.shape(), ", the part ",
           describe(piece.part));
    }
  }
  for (const auto& [name, file] : files_) {
    if (file.tensors().size() == pieces[name]) continue;
    fail(ErrorKind::kData, kWhere, file.source(), ": holds ", file.tensors().size(), " tensors but the manifest says ",
         pieces[name]);
  }
}

int64_t CheckpointTensors::bytes() const {
  int64_t sum = 0;
  for (const auto& [name, file] : files_) sum += static_cast<int64_t>(file.bytes().size());
  return sum;
}

const CheckpointTensor* CheckpointTensors::find(std::string_view name) const {
  const auto found = by_name_.find(name);
  return found == by_name_.end() ? nullptr : &tensors_[found->second];
}

const CheckpointTensor& CheckpointTensors::entry(std::string_view name) const {
  if (const CheckpointTensor* found = find(name)) return *found;
  std::vector<std::string> names;
  for (const CheckpointTensor& each : tensors_) names.push_back(each.name);
  fail(ErrorKind::kData, kWhere, source_, ": there is no tensor ", quoted(name), " among its ", names.size(),
       did_you_mean(name, names));
}

Tensor CheckpointTensors::load(std::string_view name, Device device) const {
  return load(name, TensorPart::all(entry(name).shape), device);
}

Tensor CheckpointTensors::load(std::string_view name, const TensorPart& part, Device device) const {
  const CheckpointTensor& stored = entry(name);
  if (!(part.whole == stored.shape)) {
    fail(ErrorKind::kData, kWhere, source_, ": tensor ", quoted(name), " is ", stored.dtype, ' ', stored.shape,
         "; the program expects one ", part.whole);
  }
  const Tensor tensor = Tensor::empty(part.shape(), stored.dtype, device);
  if (part.count() == 0 || DryRun::active()) return tensor;
  const int64_t size = size_of(stored.dtype);
  const std::vector<Run> wanted = runs_of(part);
  std::vector<Copy> copies;
  for (const CheckpointPiece& piece : stored.pieces) {
    const SafetensorsFile& file = files_.at(piece.file);
    const std::span<const std::byte> bytes = file.bytes(file.entry(name));
    auto want = wanted.begin();
    for (const Run& has : runs_of(piece.part)) {
      while (want != wanted.end() && want->at + want->count <= has.at) ++want;
      // The last one that reaches beyond may go on in the next stretch of the piece.
      for (auto each = want; each != wanted.end() && each->at < has.at + has.count; ++each) {
        const int64_t begin = std::max(each->at, has.at);
        const int64_t end = std::min(each->at + each->count, has.at + has.count);
        const auto from = bytes.subspan(static_cast<size_t>((has.from + begin - has.at) * size),
                                        static_cast<size_t>((end - begin) * size));
        if (stored.dtype == DType::boolean) check_bools(from, stored, file.source());
        copies.push_back({from, (each->from + begin - each->at) * size});
      }
    }
  }
  if (copies.size() == 1) {
    backend(device).to_device(tensor.raw(), copies[0].from.data(), copies[0].from.size());
    return tensor;
  }
  // One transfer, however small the pieces are.
  const bool on_host = device.kind == DeviceKind::cpu;
  const Tensor host = on_host ? tensor : Tensor::empty(part.shape(), stored.dtype);
  for (const Copy& copy : copies)
    std::memcpy(static_cast<std::byte*>(host.raw()) + copy.to, copy.from.data(), copy.from.size());
  if (!on_host) backend(device).to_device(tensor.raw(), host.raw(), static_cast<size_t>(part.count() * size));
  return tensor;
}

NamedTensors CheckpointTensors::load_all(Device device) const {
  NamedTensors all;
  for (const CheckpointTensor& each : tensors_) all.emplace_back(each.name, load(each.name, device));
  return all;
}

}  // namespace weft
