#pragma once
#include <sys/types.h>

#include <cstdint>
#include <functional>

#include "dist/control/keys.h"

namespace weft::testing {

/// 1,000 connections to a control server that know its public key at most: 250 that say nothing, 250 of random bytes,
/// 250 that announce 2^62 bytes, 250 with the wrong keys; all stay until `hold` returns. For a process of its own, so
/// that its memory is not the server's; it is ended where the server does not take a connection.
void attack(int port, const dist::ControlKeys& keys, const std::function<void()>& hold);

/// Raises this process's limit of open files as far as that takes, if it may.
void allow_many_connections();

/// Memory of a process.
int64_t resident_bytes(pid_t pid);

}  // namespace weft::testing
