#pragma once
#include <map>
#include <string>
#include <string_view>
#include <vector>

#include "core/safetensors.h"
#include "core/tensor_part.h"
#include "optim/parameter.h"

namespace weft {

/// Some elements of a tensor and the file that holds them, under the tensor's name, as a tensor of part.shape().
struct CheckpointPiece {
  std::string file;
  TensorPart part;
  bool operator==(const CheckpointPiece&) const = default;
};

/// A whole tensor and where a checkpoint has it.
struct CheckpointTensor {
  std::string name;
  DType dtype = DType::f32;
  Shape shape;
  std::vector<CheckpointPiece> pieces;
  bool operator==(const CheckpointTensor&) const = default;
};

/// The tensors of one kind (the model's, the optimizer's) in an open checkpoint, whatever files their pieces are in.
/// Any part of a tensor can be had, and of the files no more is read than its bytes.
class CheckpointTensors {
 public:
  /// A file with whole tensors: format version 1.
  explicit CheckpointTensors(SafetensorsFile file);
  /// Pieces that make up whole tensors: version 2. `files` by name; `source` names the checkpoint in messages.
  /// @throws Error kData if a file lacks a piece, has one in another shape or dtype, or holds anything else.
  CheckpointTensors(std::vector<CheckpointTensor> tensors, std::map<std::string, SafetensorsFile> files,
                    std::string source);

  /// In the order of the manifest, or of the one file: of Weft's own by size of element, largest first, then by name.
  const std::vector<CheckpointTensor>& tensors() const { return tensors_; }
  const std::string& source() const { return source_; }
  /// Of all files.
  int64_t bytes() const;

  bool contains(std::string_view name) const { return find(name) != nullptr; }
  /// @throws Error kData if there is none, with the closest name.
  const CheckpointTensor& entry(std::string_view name) const;

  /// A copy of the tensor, counted under the MemoryScope of the caller.
  /// @throws Error kData if there is none of that name, or if it is BOOL and holds a byte other than 0 and 1.
  Tensor load(std::string_view name, Device device = Device::cpu()) const;
  /// The same of some of its elements, as a tensor of part.shape(). @throws Error kData also for another whole shape.
  Tensor load(std::string_view name, const TensorPart& part, Device device = Device::cpu()) const;
  /// Every tensor with its name, in the order of tensors().
  NamedTensors load_all(Device device = Device::cpu()) const;

 private:
  const CheckpointTensor* find(std::string_view name) const;

  std::string source_;
  std::map<std::string, SafetensorsFile> files_;
  std::vector<CheckpointTensor> tensors_;
  std::map<std::string, size_t, std::less<>> by_name_;
};

}  // namespace weft
