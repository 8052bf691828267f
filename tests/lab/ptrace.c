/*
 * Loaded before a user-mode kernel on processors with a large extended state (AMX).
 *
 * The kernel of Debian 12 keeps a task's floating-point registers in a buffer of 2 to 3 KiB. Where the processor's
 * state is larger, the host's kernel refuses to take such a buffer back (EFAULT, arch/x86/kernel/fpu/regset.c,
 * xstateregs_set), and the user-mode kernel panics: "ptrace set fp regs failed, errno = 14". So the whole state is
 * read, what the kernel knows is put into it, and the whole is written.
 */
#define _GNU_SOURCE
#include <stdarg.h>
#include <string.h>
#include <sys/ptrace.h>
#include <sys/syscall.h>
#include <sys/uio.h>
#include <unistd.h>

#define NT_X86_XSTATE 0x202
#define HEADER 512            /* where the state's header begins: its first word says which components are there */
#define FIT 0x2ffUL           /* the components that lie within the kernel's buffer: up to AVX-512, and PKRU */
#define LARGEST (32 * 1024)

long ptrace(enum __ptrace_request request, ...)
{
    static char whole[LARGEST] __attribute__((aligned(64)));
    va_list rest;
    long result, peeked;

    va_start(rest, request);
    pid_t pid = va_arg(rest, pid_t);
    void *address = va_arg(rest, void *);
    void *data = va_arg(rest, void *);
    va_end(rest);
    if (request == PTRACE_SETREGSET && (long)address == NT_X86_XSTATE) {
        struct iovec *given = data, all = {whole, sizeof(whole)};
        if (syscall(SYS_ptrace, PTRACE_GETREGSET, pid, address, &all) == 0 && all.iov_len > given->iov_len) {
            memcpy(whole, given->iov_base, given->iov_len);
            *(unsigned long *)(whole + HEADER) &= FIT;
            return syscall(SYS_ptrace, PTRACE_SETREGSET, pid, address, &all);
        }
    }
    if (request == PTRACE_PEEKTEXT || request == PTRACE_PEEKDATA || request == PTRACE_PEEKUSER) {
        result = syscall(SYS_ptrace, request, pid, address, &peeked);
        return result < 0 ? result : peeked;
    }
    return syscall(SYS_ptrace, request, pid, address, data);
}
