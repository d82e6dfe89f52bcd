package uring

import (
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"testing"
	"unsafe"
)

// fact is one number of the interface: as C spells it, as the package has it,
// and the fixed value it must have whatever header is installed.
type fact struct {
	c      string
	have   uint64
	golden uint64
}

var constants = []fact{
	{"IORING_OP_NOP", IORING_OP_NOP, 0},
	{"IORING_OP_FSYNC", IORING_OP_FSYNC, 3},
	{"IORING_OP_READ_FIXED", IORING_OP_READ_FIXED, 4},
	{"IORING_OP_WRITE_FIXED", IORING_OP_WRITE_FIXED, 5},
	{"IORING_OP_POLL_ADD", IORING_OP_POLL_ADD, 6},
	{"IORING_OP_TIMEOUT", IORING_OP_TIMEOUT, 11},
	{"IORING_OP_ASYNC_CANCEL", IORING_OP_ASYNC_CANCEL, 14},
	{"IORING_OP_FALLOCATE", IORING_OP_FALLOCATE, 17},
	{"IORING_OP_READ", IORING_OP_READ, 22},
	{"IORING_OP_WRITE", IORING_OP_WRITE, 23},
	{"IORING_OP_URING_CMD", IORING_OP_URING_CMD, 46},
	{"IOSQE_FIXED_FILE", IOSQE_FIXED_FILE, 1},
	{"IOSQE_ASYNC", IOSQE_ASYNC, 16},
	{"IORING_FSYNC_DATASYNC", IORING_FSYNC_DATASYNC, 1},
	{"IORING_OFF_SQ_RING", ioringOffSQRing, 0},
	{"IORING_OFF_SQES", ioringOffSQEs, 0x10000000},
	{"IORING_SETUP_CLAMP", ioringSetupClamp, 1 << 4},
	{"IORING_SETUP_SUBMIT_ALL", ioringSetupSubmitAll, 1 << 7},
	{"IORING_SETUP_COOP_TASKRUN", ioringSetupCoopTaskrun, 1 << 8},
	{"IORING_SETUP_TASKRUN_FLAG", ioringSetupTaskrunFlag, 1 << 9},
	{"IORING_SETUP_SQE128", ioringSetupSQE128, 1 << 10},
	{"IORING_SETUP_SINGLE_ISSUER", ioringSetupSingleIssuer, 1 << 12},
	{"IORING_SETUP_DEFER_TASKRUN", ioringSetupDeferTaskrun, 1 << 13},
	{"IORING_SETUP_NO_SQARRAY", ioringSetupNoSQArray, 1 << 16},
	{"IORING_FEAT_SINGLE_MMAP", ioringFeatSingleMmap, 1},
	{"IORING_FEAT_NODROP", ioringFeatNodrop, 2},
	{"IORING_FEAT_EXT_ARG", ioringFeatExtArg, 1 << 8},
	{"IORING_SQ_CQ_OVERFLOW", ioringSQCQOverflow, 2},
	{"IORING_SQ_TASKRUN", ioringSQTaskrun, 4},
	{"IORING_ENTER_GETEVENTS", ioringEnterGetevents, 1},
	{"IORING_ENTER_REGISTERED_RING", ioringEnterRegisteredRing, 16},
	{"IORING_UNREGISTER_BUFFERS", ioringUnregisterBuffers, 1},
	{"IORING_UNREGISTER_FILES", ioringUnregisterFiles, 3},
	{"IORING_REGISTER_FILES_UPDATE", ioringRegisterFilesUpdate, 6},
	{"IORING_REGISTER_FILES2", ioringRegisterFiles2, 13},
	{"IORING_REGISTER_BUFFERS2", ioringRegisterBuffers2, 15},
	{"IORING_REGISTER_BUFFERS_UPDATE", ioringRegisterBuffersUpdate, 16},
	{"IORING_REGISTER_RING_FDS", ioringRegisterRingFds, 20},
	{"IORING_UNREGISTER_RING_FDS", ioringUnregisterRingFds, 21},
	{"IORING_RSRC_REGISTER_SPARSE", ioringRsrcRegisterSparse, 1},
}

func layout() []fact {
	var (
		s  SQE
		c  CQE
		p  params
		sq sqOffsets
		cq cqOffsets
		fu filesUpdate
		rr rsrcRegister
		ru rsrcUpdate
		r2 rsrcUpdate2
		ts Timespec
	)
	size := func(c string, have uintptr, golden uint64) fact {
		return fact{"sizeof(struct " + c + ")", uint64(have), golden}
	}
	at := func(c, field string, have uintptr, golden uint64) fact {
		return fact{fmt.Sprintf("offsetof(struct %s, %s)", c, field), uint64(have), golden}
	}
	return []fact{
		size("io_uring_sqe", unsafe.Sizeof(s), 64),
		at("io_uring_sqe", "opcode", unsafe.Offsetof(s.Opcode), 0),
		at("io_uring_sqe", "flags", unsafe.Offsetof(s.Flags), 1),
		at("io_uring_sqe", "ioprio", unsafe.Offsetof(s.Ioprio), 2),
		at("io_uring_sqe", "fd", unsafe.Offsetof(s.Fd), 4),
		at("io_uring_sqe", "off", unsafe.Offsetof(s.Off), 8),
		at("io_uring_sqe", "cmd_op", unsafe.Offsetof(s.Off), 8),
		at("io_uring_sqe", "addr", unsafe.Offsetof(s.Addr), 16),
		at("io_uring_sqe", "len", unsafe.Offsetof(s.Len), 24),
		at("io_uring_sqe", "rw_flags", unsafe.Offsetof(s.OpFlags), 28),
		at("io_uring_sqe", "user_data", unsafe.Offsetof(s.UserData), 32),
		at("io_uring_sqe", "buf_index", unsafe.Offsetof(s.BufIndex), 40),
		at("io_uring_sqe", "personality", unsafe.Offsetof(s.Personality), 42),
		at("io_uring_sqe", "file_index", unsafe.Offsetof(s.FileIndex), 44),
		at("io_uring_sqe", "addr3", unsafe.Offsetof(s.Addr3), 48),
		at("io_uring_sqe", "cmd", cmdOffset, 48),
		size("io_uring_cqe", unsafe.Sizeof(c), 16),
		at("io_uring_cqe", "user_data", unsafe.Offsetof(c.UserData), 0),
		at("io_uring_cqe", "res", unsafe.Offsetof(c.Res), 8),
		at("io_uring_cqe", "flags", unsafe.Offsetof(c.Flags), 12),
		size("io_uring_params", unsafe.Sizeof(p), 120),
		at("io_uring_params", "cq_entries", unsafe.Offsetof(p.cqEntries), 4),
		at("io_uring_params", "flags", unsafe.Offsetof(p.flags), 8),
		at("io_uring_params", "features", unsafe.Offsetof(p.features), 20),
		at("io_uring_params", "wq_fd", unsafe.Offsetof(p.wqFd), 24),
		at("io_uring_params", "sq_off", unsafe.Offsetof(p.sqOff), 40),
		at("io_uring_params", "cq_off", unsafe.Offsetof(p.cqOff), 80),
		size("io_sqring_offsets", unsafe.Sizeof(sq), 40),
		at("io_sqring_offsets", "ring_mask", unsafe.Offsetof(sq.ringMask), 8),
		at("io_sqring_offsets", "flags", unsafe.Offsetof(sq.flags), 16),
		at("io_sqring_offsets", "array", unsafe.Offsetof(sq.array), 24),
		size("io_cqring_offsets", unsafe.Sizeof(cq), 40),
		at("io_cqring_offsets", "ring_mask", unsafe.Offsetof(cq.ringMask), 8),
		at("io_cqring_offsets", "cqes", unsafe.Offsetof(cq.cqes), 20),
		size("io_uring_files_update", unsafe.Sizeof(fu), 16),
		at("io_uring_files_update", "fds", unsafe.Offsetof(fu.fds), 8),
		size("io_uring_rsrc_register", unsafe.Sizeof(rr), 32),
		at("io_uring_rsrc_register", "flags", unsafe.Offsetof(rr.flags), 4),
		at("io_uring_rsrc_register", "data", unsafe.Offsetof(rr.data), 16),
		size("io_uring_rsrc_update", unsafe.Sizeof(ru), 16),
		at("io_uring_rsrc_update", "data", unsafe.Offsetof(ru.data), 8),
		size("io_uring_rsrc_update2", unsafe.Sizeof(r2), 32),
		at("io_uring_rsrc_update2", "data", unsafe.Offsetof(r2.data), 8),
		at("io_uring_rsrc_update2", "tags", unsafe.Offsetof(r2.tags), 16),
		at("io_uring_rsrc_update2", "nr", unsafe.Offsetof(r2.nr), 24),
		size("__kernel_timespec", unsafe.Sizeof(ts), 16),
		at("__kernel_timespec", "tv_nsec", unsafe.Offsetof(ts.Nsec), 8),
	}
}

func TestABIAgainstFixedValues(t *testing.T) {
	for _, f := range append(layout(), constants...) {
		if f.have != f.golden {
			t.Errorf("%s = %#x, want %#x", f.c, f.have, f.golden)
		}
	}
}

func TestABIAgainstHeader(t *testing.T) {
	cc, err := exec.LookPath("cc")
	if err != nil {
		t.Skip("no C compiler: install gcc and linux-libc-dev to check against the kernel's header")
	}
	facts := append(layout(), constants...)
	var src strings.Builder
	src.WriteString("#include <stdio.h>\n#include <stddef.h>\n#include <linux/io_uring.h>\nint main(void) {\n")
	for _, f := range facts {
		fmt.Fprintf(&src, "printf(\"%%llu\\n\", (unsigned long long)(%s));\n", f.c)
	}
	src.WriteString("return 0; }\n")
	dir := t.TempDir()
	file, prog := filepath.Join(dir, "abi.c"), filepath.Join(dir, "abi")
	if err := os.WriteFile(file, []byte(src.String()), 0o600); err != nil {
		t.Fatal(err)
	}
	if out, err := exec.Command(cc, "-o", prog, file).CombinedOutput(); err != nil {
		if strings.Contains(string(out), "linux/io_uring.h: No such file") {
			t.Skip("no <linux/io_uring.h>: install linux-libc-dev")
		}
		t.Skipf("the installed header is too old for the comparison (Linux 6.1 has all names): %s", out)
	}
	out, err := exec.Command(prog).Output()
	if err != nil {
		t.Fatal(err)
	}
	values := strings.Fields(string(out))
	if len(values) != len(facts) {
		t.Fatalf("the C program printed %d values, want %d", len(values), len(facts))
	}
	for i, f := range facts {
		if v, err := strconv.ParseUint(values[i], 10, 64); err != nil || v != f.have {
			t.Errorf("%s = %#x here, %s in the header", f.c, f.have, values[i])
		}
	}
}
