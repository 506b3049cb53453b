"""Measure the processor's virtualisation: how long guest kernel code takes beside the same code run natively.

Run as a program of its own, with a deadline: on some hosts KVM_RUN does not return. Standard library only.
Prints JSON: ``{"guest_ns": ..., "native_ns": ...}`` per loop iteration, or ``{"error": ...}``.
"""

import ctypes
import fcntl
import json
import mmap
import os
import struct
import sys
import time
from pathlib import Path

KVM_GET_API_VERSION, KVM_CREATE_VM = 0xAE00, 0xAE01
KVM_GET_VCPU_MMAP_SIZE, KVM_CREATE_VCPU = 0xAE04, 0xAE41
KVM_SET_USER_MEMORY_REGION, KVM_SET_TSS_ADDR, KVM_RUN = 0x4020AE46, 0xAE47, 0xAE80
KVM_SET_REGS, KVM_GET_SREGS, KVM_SET_SREGS = 0x4090AE82, 0x8138AE83, 0x4138AE84
KVM_EXIT_HLT = 5
EXIT_REASON_OFFSET = 8  # in struct kvm_run
SREGS_SIZE = 312
CONTROL_REGISTERS_OFFSET = 8 * 24 + 2 * 16  # in struct kvm_sregs, after eight segments and two descriptor tables

MEMORY_BYTES = 64 << 10
UNUSED_ADDRESS = 1 << 28  # where Intel processors keep a task segment for real mode: anywhere beyond the memory
PML4, PDPT, DIRECTORY, CODE = 0x1000, 0x2000, 0x3000, 0x4000
PAGE_PRESENT_WRITABLE, PAGE_LARGE = 0x3, 0x80
CR0_PAGING_PROTECTED = 0x80050033
CR4_PAE = 0x20
EFER_LONG_MODE = 0x500
LOOP = bytes.fromhex("ffc9 75fc")  # again: dec ecx; jnz again
HLT, RET = b"\xf4", b"\xc3"

WARM_UP, ITERATIONS = 100, 10_000


def main() -> None:
    try:
        result: dict[str, float | str] = {"guest_ns": guest_ns(), "native_ns": native_ns()}
    except OSError as error:
        result = {"error": f"{error.strerror}"}
    json.dump(result, sys.stdout)


def guest_ns() -> float:
    """Nanoseconds an iteration takes in ring 0 of a guest in long mode."""
    kvm = os.open("/dev/kvm", os.O_RDWR | os.O_CLOEXEC)
    if (version := fcntl.ioctl(kvm, KVM_GET_API_VERSION, 0)) != 12:
        raise OSError(0, f"KVM API version {version} instead of 12")
    machine = fcntl.ioctl(kvm, KVM_CREATE_VM, 0)
    fcntl.ioctl(machine, KVM_SET_TSS_ADDR, UNUSED_ADDRESS)
    memory = mmap.mmap(-1, MEMORY_BYTES)
    _fill(memory)
    address = ctypes.addressof(ctypes.c_char.from_buffer(memory))
    fcntl.ioctl(machine, KVM_SET_USER_MEMORY_REGION, struct.pack("<IIQQQ", 0, 0, 0, MEMORY_BYTES, address))
    cpu = fcntl.ioctl(machine, KVM_CREATE_VCPU, 0)
    shared = mmap.mmap(cpu, fcntl.ioctl(kvm, KVM_GET_VCPU_MMAP_SIZE, 0))
    fcntl.ioctl(cpu, KVM_SET_SREGS, _long_mode(bytearray(fcntl.ioctl(cpu, KVM_GET_SREGS, bytes(SREGS_SIZE)))))
    # Two lengths: their difference holds neither the entry into the guest nor its first page faults.
    return max(0.0, _timed_run(cpu, shared, ITERATIONS) - _timed_run(cpu, shared, WARM_UP)) / (ITERATIONS - WARM_UP)


def _fill(memory: mmap.mmap) -> None:
    """Identity-map the first 2 MiB and put the loop in."""
    for table, entry in ((PML4, PDPT), (PDPT, DIRECTORY), (DIRECTORY, PAGE_LARGE)):
        memory[table : table + 8] = struct.pack("<Q", entry | PAGE_PRESENT_WRITABLE)
    memory[CODE : CODE + 5] = LOOP + HLT


def _long_mode(registers: bytearray) -> bytes:
    code = struct.pack("<QIHBBBBBBBBBB", 0, 0xFFFFFFFF, 8, 11, 1, 0, 0, 1, 1, 1, 0, 0, 0)
    data = struct.pack("<QIHBBBBBBBBBB", 0, 0xFFFFFFFF, 16, 3, 1, 0, 1, 1, 0, 1, 0, 0, 0)
    registers[0 : 6 * 24] = code + data * 5  # cs, ds, es, fs, gs, ss
    cr0_cr2_cr3_cr4_cr8_efer = (CR0_PAGING_PROTECTED, 0, PML4, CR4_PAE, 0, EFER_LONG_MODE)
    struct.pack_into("<6Q", registers, CONTROL_REGISTERS_OFFSET, *cr0_cr2_cr3_cr4_cr8_efer)
    return bytes(registers)


def _timed_run(cpu: int, shared: mmap.mmap, iterations: int) -> int:
    rcx, rip, rflags = 2, 16, 17  # places in struct kvm_regs
    registers = [0] * 18
    registers[rcx], registers[rip], registers[rflags] = iterations, CODE, 2
    fcntl.ioctl(cpu, KVM_SET_REGS, struct.pack("<18Q", *registers))
    began = time.perf_counter_ns()
    fcntl.ioctl(cpu, KVM_RUN, 0)
    took = time.perf_counter_ns() - began
    (reason,) = struct.unpack_from("<I", shared, EXIT_REASON_OFFSET)
    if reason != KVM_EXIT_HLT:
        raise OSError(0, f"the guest left with exit reason {reason} instead of halting")
    return took


def native_ns() -> float:
    """Nanoseconds the same iteration takes in this process."""
    code = mmap.mmap(-1, mmap.PAGESIZE, prot=mmap.PROT_READ | mmap.PROT_WRITE | mmap.PROT_EXEC)
    code.write(b"\x89\xf9" + LOOP + RET)  # mov ecx, edi
    call = ctypes.CFUNCTYPE(None, ctypes.c_uint32)(ctypes.addressof(ctypes.c_char.from_buffer(code)))
    call(WARM_UP)
    began = time.perf_counter_ns()
    call(ITERATIONS * 100)
    return (time.perf_counter_ns() - began) / (ITERATIONS * 100)


if __name__ == "__main__":
    if not Path("/dev/kvm").exists():
        json.dump({"error": "there is no /dev/kvm"}, sys.stdout)
    else:
        main()
