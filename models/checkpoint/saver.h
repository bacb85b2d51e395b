#pragma once
#include <memory>

#include "dist/group.h"
#include "models/checkpoint/checkpoint.h"

namespace weft {

/// A tensor to be stored, or what of it this process holds.
struct StoredTensor {
  std::string name;                     ///< of the whole tensor
  Tensor tensor;                        ///< the elements of the part, in its shape or flat
  std::optional<TensorPart> part = {};  ///< nothing: all of it
};

/// What one rank brings to a checkpoint. Step and tensors are of each rank, all else is what rank 0 says.
struct ShardedContent : CheckpointInfo {
  std::vector<StoredTensor> model, optimizer;
  std::map<std::string, std::string> text_files;  ///< as CheckpointContent
};

/// Tensors with the parts that their parameters have: each state of a parameter, "<parameter>.<name of the state>", has
/// that of the parameter.
std::vector<StoredTensor> stored_whole(const NamedTensors& tensors);
std::vector<StoredTensor> stored_parameters(const Parameters& parameters);
std::vector<StoredTensor> stored_state(const NamedTensors& state, const Parameters& parameters);

/// What a rank of a group (null: this process alone) holds of the tensors of a checkpoint, under the same names and in
/// the shapes of `wanted`. All ranks call it. @throws Error kData if the checkpoint lacks a tensor, has it in another
/// whole shape, or has one that no rank wants.
NamedTensors load_stored(const CheckpointTensors& tensors, const std::vector<StoredTensor>& wanted, dist::Group* group);

/// Saves checkpoints into one directory, over the ranks of a group together: what several ranks hold alike one of them
/// writes, and each writes its own files (format version 2; one rank alone writes version 1). As with save_checkpoint()
/// a checkpoint appears complete and durable or not at all, whatever happens to any rank; what fails on one rank is an
/// Error on all, which names the rank.
///
/// Written in the background a save is: begin(), which copies to host memory what this rank is to write; training goes
/// on meanwhile; poll() once a step, by which the ranks learn that all have written their files, and then that the
/// checkpoint is there; and finish() at the end. No thread but the caller's ever uses the group:
///
///   saver.begin(content);
///   for (;;) { step(); if (auto path = saver.poll(any_rank(saver.writing()))) ...; }
///
/// where any_rank() is an all-reduce, one that the caller makes anyway: a flag in it costs nothing, and poll() itself
/// talks to other ranks only when one part of the save is done. All ranks call begin(), poll(), finish() and save()
/// alike.
///
/// The writing gives way to training: it takes what processors are idle, and where none is, 1% of one, so that however
/// busy the machine is it ends after at most a hundred times the processor time that it needs and what the disk takes.
/// finish() does what is left itself, at the priority of its caller.
class CheckpointSaver {
 public:
  /// @param group  null: this process alone. Must outlive this, and the directory be one that all ranks
  /// see. options.after_step is called on each rank, from whatever thread has done the step.
  CheckpointSaver(std::string root, dist::Group* group, SaveCheckpointOptions options = {});
  /// A checkpoint that was not published is gone.
  ~CheckpointSaver();

  /// Returns when the checkpoint is there, with its path. @throws Error as save_checkpoint(), and kValue, before
  /// anything is written, if the tensors of all ranks do not make whole ones; kState while another save is pending.
  std::string save(const ShardedContent& content);

  /// Begins to write in the background; the tensors may be changed on return. @throws Error as save().
  void begin(const ShardedContent& content);
  /// Whether a save has begun that is not published.
  bool pending() const;
  /// Whether this rank is at work on it in the background: on its files, or on the directory.
  bool writing() const;
  /// The path of the checkpoint if it is there, once. @param anywhere  writing() of any rank, the same on all
  /// @throws Error  what a rank failed with since begin(); the checkpoint is gone then, older ones are there.
  std::optional<std::string> poll(bool anywhere);
  /// Writes what is left and publishes; nothing if no save is pending. @throws Error as poll().
  std::optional<std::string> finish();

 private:
  struct Save;
  void start(const ShardedContent& content, bool background);
  void list_files(Save& save);

  std::string root_;
  dist::Group* group_;
  SaveCheckpointOptions options_;
  std::unique_ptr<Save> save_;
};

/// How writing in the background gives way here, in words: "idle class of the scheduler, idle class of the disk; where
/// no processor is idle, 1% of one".
std::string background_writing();

/// open_checkpoint() by all ranks of a group together, to load parts from: each file is read whole, to check its hash,
/// by one rank only. @throws Error  on all ranks what any of them found.
OpenCheckpoint open_checkpoint(const std::string& path, dist::Group& group);

}  // namespace weft
