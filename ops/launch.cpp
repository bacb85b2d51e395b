#include "ops/launch.h"

namespace weft {

void check_same(const char* op, std::initializer_list<const Tensor*> tensors) {
  const Tensor* first = nullptr;
  for (const Tensor* tensor : tensors) {
    if (!tensor->defined()) continue;
    if (first == nullptr) {
      first = tensor;
    } else if (tensor->dtype() != first->dtype()) {
      fail(ErrorKind::kDType, op, "dtypes must be equal, got ", first->describe(), " and ", tensor->describe(),
           ". Hint: cast with .to()");
    } else if (tensor->device() != first->device()) {
      fail(ErrorKind::kDevice, op, "tensors must be on one device, got ", first->describe(), " on ", first->device(),
           " and ", tensor->describe(), " on ", tensor->device());
    }
  }
}

}  // namespace weft
