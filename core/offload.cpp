#include "core/offload.h"

#include <unordered_map>
#include <vector>

namespace weft::autograd {
namespace {

/// A storage that rules saved, on the device, on the host or on its way.
struct Slot {
  size_t group = 0;
  std::weak_ptr<Storage> storage;  // as it was saved
  uint64_t version = 0;
  const char* changed = nullptr;  // by what, if it was in place while the copy may have read it
  Device place;
  Tensor device, host;
  std::shared_ptr<Backend::Event> pending;  // the end of a copy that the device's queue has not been told to wait for

  Slot() = default;
  Slot(const Slot&) = delete;
  Slot& operator=(const Slot&) = delete;
  ~Slot() { settle(); }

  /// Work queued from now on may use both memories, and so they may be given back.
  void settle() {
    if (pending != nullptr) backend(place).wait(*pending);
    pending = nullptr;
  }

  void send() {
    {
      const MemoryScope scope(MemoryCategory::activations);
      host = Tensor::pinned(device.shape(), device.dtype(), place);
    }
    if (DryRun::active()) return;
    pending = backend(place).copy_async(host.raw(), device.raw(), static_cast<size_t>(device.storage()->bytes()),
                                        Backend::Direction::kToHost);
  }

  /// Gives the device's memory back once it was copied.
  void leave() {
    if (!host.defined()) return;
    settle();
    note_change(device.storage());
    device = Tensor();
  }

  void fetch() {
    if (device.defined()) return;
    const MemoryScope scope(MemoryCategory::activations);
    device = Tensor::empty(host.shape(), host.dtype(), place);
    if (DryRun::active()) return;
    pending = backend(place).copy_async(device.raw(), host.raw(), static_cast<size_t>(host.storage()->bytes()),
                                        Backend::Direction::kToDevice);
  }

  void note_change(const std::shared_ptr<Storage>& saved) {
    if (saved != nullptr && saved->version() != version) changed = saved->last_change();
  }
};

/// All elements of a storage as one row.
Tensor whole(const Tensor& tensor) {
  return Tensor::make_view(tensor, {tensor.storage()->bytes() / size_of(tensor.dtype())}, {1}, 0);
}

}  // namespace

class Offload::State : public std::enable_shared_from_this<Offload::State> {
 public:
  explicit State(int64_t from) : from_(from) {}

  SavedTensorHooks::Pack begin(bool moves) {
    groups_.emplace_back();
    if (groups_.size() > 2) {
      for (const std::weak_ptr<Slot>& slot : groups_[groups_.size() - 3]) {
        if (const auto alive = slot.lock()) alive->leave();
      }
    }
    return [state = shared_from_this(), moves](const Tensor& tensor) { return state->pack(tensor, moves); };
  }

 private:
  std::function<Tensor()> pack(const Tensor& tensor, bool moves) {
    std::weak_ptr<Slot>& known = slots_[tensor.storage().get()];
    std::shared_ptr<Slot> slot = known.lock();
    if (slot == nullptr || slot->storage.lock() != tensor.storage() || slot->version != tensor.storage()->version()) {
      known = slot = make_slot(tensor, moves);
    }
    return [state = shared_from_this(), slot, shape = tensor.shape(), strides = tensor.strides(),
            offset = tensor.offset()] {
      state->bring(*slot);
      return Tensor::make_view(slot->device, shape, strides, offset);
    };
  }

  std::shared_ptr<Slot> make_slot(const Tensor& tensor, bool moves) {
    auto slot = std::make_shared<Slot>();
    const std::shared_ptr<Storage>& storage = tensor.storage();
    slot->group = groups_.size() - 1;
    slot->storage = storage;
    slot->version = storage->version();
    slot->place = tensor.device();
    slot->device = whole(tensor);
    groups_.back().push_back(slot);
    if (moves && tensor.device().kind != DeviceKind::cpu && storage->category() == MemoryCategory::activations &&
        storage->bytes() >= from_) {
      slot->send();
    }
    return slot;
  }

  /// Makes a slot usable by the device's queue, and sends for the group before its.
  void bring(Slot& slot) {
    slot.note_change(slot.storage.lock());
    if (slot.changed != nullptr) {
      fail(ErrorKind::kState, "offload", "the backward pass needs a tensor (of ",
           grouped((slot.device.defined() ? slot.device : slot.host).storage()->bytes()), " bytes) that [",
           slot.changed,
           "] changed in place after it was saved. Hint: change a clone(), or make the change after backward()");
    }
    fetch(slot.group);
    if (slot.group > 0) fetch(slot.group - 1);
    slot.settle();
  }

  /// In the order in which the backward pass will ask.
  void fetch(size_t group) {
    for (auto it = groups_[group].rbegin(); it != groups_[group].rend(); ++it) {
      if (const auto alive = it->lock()) alive->fetch();
    }
  }

  const int64_t from_;
  std::vector<std::vector<std::weak_ptr<Slot>>> groups_;
  std::unordered_map<const Storage*, std::weak_ptr<Slot>> slots_;
};

Offload::Offload(int64_t from) : state_(std::make_shared<State>(from)) {}

Offload::Group::Group(Offload& offload, bool moves) : hooks_(offload.state_->begin(moves)) {}

}  // namespace weft::autograd
