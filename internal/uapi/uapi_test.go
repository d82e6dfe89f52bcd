package uapi

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

// number is a constant: as this package has it, and as it was written down
// from the kernel's header.
type number struct {
	name   string
	got    uint64
	golden uint64
}

var numbers = []number{
	{"FIFREEZE", FIFREEZE, 0xc0045877},
	{"FITHAW", FITHAW, 0xc0045878},
	{"BLKGETDISKSEQ", BLKGETDISKSEQ, 0x80081280},

	{"BLKPG", BLKPG, 0x1269},

	{"DM_VERSION", DM_VERSION, 0xc138fd00},
	{"DM_LIST_DEVICES", DM_LIST_DEVICES, 0xc138fd02},
	{"DM_DEV_CREATE", DM_DEV_CREATE, 0xc138fd03},
	{"DM_DEV_REMOVE", DM_DEV_REMOVE, 0xc138fd04},
	{"DM_DEV_SUSPEND", DM_DEV_SUSPEND, 0xc138fd06},
	{"DM_DEV_STATUS", DM_DEV_STATUS, 0xc138fd07},
	{"DM_TABLE_LOAD", DM_TABLE_LOAD, 0xc138fd09},
	{"DM_TABLE_CLEAR", DM_TABLE_CLEAR, 0xc138fd0a},
	{"DM_TABLE_DEPS", DM_TABLE_DEPS, 0xc138fd0b},
	{"DM_TABLE_STATUS", DM_TABLE_STATUS, 0xc138fd0c},
	{"DM_VERSION_MAJOR", DM_VERSION_MAJOR, 4},
	{"DM_READONLY_FLAG", DM_READONLY_FLAG, 0x1},
	{"DM_SUSPEND_FLAG", DM_SUSPEND_FLAG, 0x2},
	{"DM_STATUS_TABLE_FLAG", DM_STATUS_TABLE_FLAG, 0x10},
	{"DM_ACTIVE_PRESENT_FLAG", DM_ACTIVE_PRESENT_FLAG, 0x20},
	{"DM_INACTIVE_PRESENT_FLAG", DM_INACTIVE_PRESENT_FLAG, 0x40},
	{"DM_BUFFER_FULL_FLAG", DM_BUFFER_FULL_FLAG, 0x100},
	{"DM_SKIP_LOCKFS_FLAG", DM_SKIP_LOCKFS_FLAG, 0x400},
	{"DM_NOFLUSH_FLAG", DM_NOFLUSH_FLAG, 0x800},
	{"DM_QUERY_INACTIVE_TABLE_FLAG", DM_QUERY_INACTIVE_TABLE_FLAG, 0x1000},
	{"DM_SECURE_DATA_FLAG", DM_SECURE_DATA_FLAG, 0x8000},
	{"DM_NAME_LEN", DM_NAME_LEN, 128},
	{"DM_UUID_LEN", DM_UUID_LEN, 129},
	{"DM_MAX_TYPE_NAME", DM_MAX_TYPE_NAME, 16},

	{"UBLK_U_CMD_GET_QUEUE_AFFINITY", UBLK_U_CMD_GET_QUEUE_AFFINITY, 0x80207501},
	{"UBLK_U_CMD_GET_DEV_INFO", UBLK_U_CMD_GET_DEV_INFO, 0x80207502},
	{"UBLK_U_CMD_ADD_DEV", UBLK_U_CMD_ADD_DEV, 0xc0207504},
	{"UBLK_U_CMD_DEL_DEV", UBLK_U_CMD_DEL_DEV, 0xc0207505},
	{"UBLK_U_CMD_START_DEV", UBLK_U_CMD_START_DEV, 0xc0207506},
	{"UBLK_U_CMD_STOP_DEV", UBLK_U_CMD_STOP_DEV, 0xc0207507},
	{"UBLK_U_CMD_SET_PARAMS", UBLK_U_CMD_SET_PARAMS, 0xc0207508},
	{"UBLK_U_CMD_GET_PARAMS", UBLK_U_CMD_GET_PARAMS, 0x80207509},
	{"UBLK_U_CMD_START_USER_RECOVERY", UBLK_U_CMD_START_USER_RECOVERY, 0xc0207510},
	{"UBLK_U_CMD_END_USER_RECOVERY", UBLK_U_CMD_END_USER_RECOVERY, 0xc0207511},
	{"UBLK_U_CMD_GET_DEV_INFO2", UBLK_U_CMD_GET_DEV_INFO2, 0x80207512},
	{"UBLK_U_CMD_GET_FEATURES", UBLK_U_CMD_GET_FEATURES, 0x80207513},
	{"UBLK_U_CMD_DEL_DEV_ASYNC", UBLK_U_CMD_DEL_DEV_ASYNC, 0x80207514},
	{"UBLK_U_CMD_UPDATE_SIZE", UBLK_U_CMD_UPDATE_SIZE, 0xc0207515},
	{"UBLK_U_CMD_QUIESCE_DEV", UBLK_U_CMD_QUIESCE_DEV, 0xc0207516},
	{"UBLK_U_CMD_TRY_STOP_DEV", UBLK_U_CMD_TRY_STOP_DEV, 0xc0207517},

	{"UBLK_U_IO_FETCH_REQ", UBLK_U_IO_FETCH_REQ, 0xc0107520},
	{"UBLK_U_IO_COMMIT_AND_FETCH_REQ", UBLK_U_IO_COMMIT_AND_FETCH_REQ, 0xc0107521},
	{"UBLK_U_IO_NEED_GET_DATA", UBLK_U_IO_NEED_GET_DATA, 0xc0107522},
	{"UBLK_U_IO_REGISTER_IO_BUF", UBLK_U_IO_REGISTER_IO_BUF, 0xc0107523},
	{"UBLK_U_IO_UNREGISTER_IO_BUF", UBLK_U_IO_UNREGISTER_IO_BUF, 0xc0107524},

	{"UBLK_IO_RES_OK", UBLK_IO_RES_OK, 0},
	{"UBLK_IO_RES_NEED_GET_DATA", UBLK_IO_RES_NEED_GET_DATA, 1},
	{"UBLK_IO_RES_ABORT", neg(UBLK_IO_RES_ABORT), neg(-19)},
	{"UBLK_FEATURES_LEN", UBLK_FEATURES_LEN, 8},
	{"UBLKSRV_CMD_BUF_OFFSET", UBLKSRV_CMD_BUF_OFFSET, 0},
	{"UBLKSRV_IO_BUF_OFFSET", UBLKSRV_IO_BUF_OFFSET, 0x80000000},
	{"UBLK_MAX_QUEUE_DEPTH", UBLK_MAX_QUEUE_DEPTH, 4096},
	{"UBLK_MAX_NR_QUEUES", UBLK_MAX_NR_QUEUES, 4096},
	{"UBLK_IO_BUF_BITS", UBLK_IO_BUF_BITS, 25},

	{"UBLK_F_SUPPORT_ZERO_COPY", UBLK_F_SUPPORT_ZERO_COPY, 0x1},
	{"UBLK_F_URING_CMD_COMP_IN_TASK", UBLK_F_URING_CMD_COMP_IN_TASK, 0x2},
	{"UBLK_F_NEED_GET_DATA", UBLK_F_NEED_GET_DATA, 0x4},
	{"UBLK_F_USER_RECOVERY", UBLK_F_USER_RECOVERY, 0x8},
	{"UBLK_F_USER_RECOVERY_REISSUE", UBLK_F_USER_RECOVERY_REISSUE, 0x10},
	{"UBLK_F_UNPRIVILEGED_DEV", UBLK_F_UNPRIVILEGED_DEV, 0x20},
	{"UBLK_F_CMD_IOCTL_ENCODE", UBLK_F_CMD_IOCTL_ENCODE, 0x40},
	{"UBLK_F_USER_COPY", UBLK_F_USER_COPY, 0x80},
	{"UBLK_F_ZONED", UBLK_F_ZONED, 0x100},
	{"UBLK_F_USER_RECOVERY_FAIL_IO", UBLK_F_USER_RECOVERY_FAIL_IO, 0x200},
	{"UBLK_F_UPDATE_SIZE", UBLK_F_UPDATE_SIZE, 0x400},
	{"UBLK_F_AUTO_BUF_REG", UBLK_F_AUTO_BUF_REG, 0x800},
	{"UBLK_F_QUIESCE", UBLK_F_QUIESCE, 0x1000},
	{"UBLK_F_PER_IO_DAEMON", UBLK_F_PER_IO_DAEMON, 0x2000},
	{"UBLK_F_BUF_REG_OFF_DAEMON", UBLK_F_BUF_REG_OFF_DAEMON, 0x4000},
	{"UBLK_F_BATCH_IO", UBLK_F_BATCH_IO, 0x8000},
	{"UBLK_F_INTEGRITY", UBLK_F_INTEGRITY, 0x10000},
	{"UBLK_F_SAFE_STOP_DEV", UBLK_F_SAFE_STOP_DEV, 0x20000},
	{"UBLK_F_NO_AUTO_PART_SCAN", UBLK_F_NO_AUTO_PART_SCAN, 0x40000},
	{"UBLK_F_SHMEM_ZC", UBLK_F_SHMEM_ZC, 0x80000},

	{"UBLK_S_DEV_DEAD", UBLK_S_DEV_DEAD, 0},
	{"UBLK_S_DEV_LIVE", UBLK_S_DEV_LIVE, 1},
	{"UBLK_S_DEV_QUIESCED", UBLK_S_DEV_QUIESCED, 2},
	{"UBLK_S_DEV_FAIL_IO", UBLK_S_DEV_FAIL_IO, 3},

	{"UBLK_IO_OP_READ", UBLK_IO_OP_READ, 0},
	{"UBLK_IO_OP_WRITE", UBLK_IO_OP_WRITE, 1},
	{"UBLK_IO_OP_FLUSH", UBLK_IO_OP_FLUSH, 2},
	{"UBLK_IO_OP_DISCARD", UBLK_IO_OP_DISCARD, 3},
	{"UBLK_IO_OP_WRITE_SAME", UBLK_IO_OP_WRITE_SAME, 4},
	{"UBLK_IO_OP_WRITE_ZEROES", UBLK_IO_OP_WRITE_ZEROES, 5},
	{"UBLK_IO_OP_ZONE_OPEN", UBLK_IO_OP_ZONE_OPEN, 10},
	{"UBLK_IO_OP_ZONE_CLOSE", UBLK_IO_OP_ZONE_CLOSE, 11},
	{"UBLK_IO_OP_ZONE_FINISH", UBLK_IO_OP_ZONE_FINISH, 12},
	{"UBLK_IO_OP_ZONE_APPEND", UBLK_IO_OP_ZONE_APPEND, 13},
	{"UBLK_IO_OP_ZONE_RESET_ALL", UBLK_IO_OP_ZONE_RESET_ALL, 14},
	{"UBLK_IO_OP_ZONE_RESET", UBLK_IO_OP_ZONE_RESET, 15},
	{"UBLK_IO_OP_REPORT_ZONES", UBLK_IO_OP_REPORT_ZONES, 18},

	{"UBLK_IO_F_FAILFAST_DEV", UBLK_IO_F_FAILFAST_DEV, 0x100},
	{"UBLK_IO_F_FAILFAST_TRANSPORT", UBLK_IO_F_FAILFAST_TRANSPORT, 0x200},
	{"UBLK_IO_F_FAILFAST_DRIVER", UBLK_IO_F_FAILFAST_DRIVER, 0x400},
	{"UBLK_IO_F_META", UBLK_IO_F_META, 0x800},
	{"UBLK_IO_F_FUA", UBLK_IO_F_FUA, 0x2000},
	{"UBLK_IO_F_NOUNMAP", UBLK_IO_F_NOUNMAP, 0x8000},
	{"UBLK_IO_F_SWAP", UBLK_IO_F_SWAP, 0x10000},
	{"UBLK_IO_F_NEED_REG_BUF", UBLK_IO_F_NEED_REG_BUF, 0x20000},
	{"UBLK_AUTO_BUF_REG_FALLBACK", UBLK_AUTO_BUF_REG_FALLBACK, 1},

	{"UBLK_ATTR_READ_ONLY", UBLK_ATTR_READ_ONLY, 1},
	{"UBLK_ATTR_ROTATIONAL", UBLK_ATTR_ROTATIONAL, 2},
	{"UBLK_ATTR_VOLATILE_CACHE", UBLK_ATTR_VOLATILE_CACHE, 4},
	{"UBLK_ATTR_FUA", UBLK_ATTR_FUA, 8},
	{"UBLK_PARAM_TYPE_BASIC", UBLK_PARAM_TYPE_BASIC, 0x1},
	{"UBLK_PARAM_TYPE_DISCARD", UBLK_PARAM_TYPE_DISCARD, 0x2},
	{"UBLK_PARAM_TYPE_DEVT", UBLK_PARAM_TYPE_DEVT, 0x4},
	{"UBLK_PARAM_TYPE_ZONED", UBLK_PARAM_TYPE_ZONED, 0x8},
	{"UBLK_PARAM_TYPE_DMA_ALIGN", UBLK_PARAM_TYPE_DMA_ALIGN, 0x10},
	{"UBLK_PARAM_TYPE_SEGMENT", UBLK_PARAM_TYPE_SEGMENT, 0x20},
	{"UBLK_PARAM_TYPE_INTEGRITY", UBLK_PARAM_TYPE_INTEGRITY, 0x40},
}

func neg(n int64) uint64 { return uint64(n) }

// place is a size (field "") or the offset of a field.
type place struct {
	c      string // struct
	field  string
	got    uintptr
	golden uintptr
	since  string // macro that the header has if it has this field
}

var (
	dmctl  DMIoctl
	dmspec DMTargetSpec
	dmdeps DMTargetDeps
	dmname DMNameList
	ctrl   UblksrvCtrlCmd
	info   UblksrvCtrlDevInfo
	desc   UblksrvIODesc
	iocmd  UblksrvIOCmd
	auto   UblkAutoBufReg
	basic  UblkParamBasic
	disc   UblkParamDiscard
	devt   UblkParamDevt
	zoned  UblkParamZoned
	dma    UblkParamDMAAlign
	seg    UblkParamSegment
	integ  UblkParamIntegrity
	params UblkParams
)

var places = []place{
	{"dm_ioctl", "", unsafe.Sizeof(dmctl), 312, ""},
	{"dm_ioctl", "version", unsafe.Offsetof(dmctl.Version), 0, ""},
	{"dm_ioctl", "data_size", unsafe.Offsetof(dmctl.DataSize), 12, ""},
	{"dm_ioctl", "data_start", unsafe.Offsetof(dmctl.DataStart), 16, ""},
	{"dm_ioctl", "target_count", unsafe.Offsetof(dmctl.TargetCount), 20, ""},
	{"dm_ioctl", "open_count", unsafe.Offsetof(dmctl.OpenCount), 24, ""},
	{"dm_ioctl", "flags", unsafe.Offsetof(dmctl.Flags), 28, ""},
	{"dm_ioctl", "event_nr", unsafe.Offsetof(dmctl.EventNr), 32, ""},
	{"dm_ioctl", "dev", unsafe.Offsetof(dmctl.Dev), 40, ""},
	{"dm_ioctl", "name", unsafe.Offsetof(dmctl.Name), 48, ""},
	{"dm_ioctl", "uuid", unsafe.Offsetof(dmctl.UUID), 176, ""},
	{"dm_ioctl", "data", unsafe.Offsetof(dmctl.Data), 305, ""},
	{"dm_target_spec", "", unsafe.Sizeof(dmspec), 40, ""},
	{"dm_target_spec", "sector_start", unsafe.Offsetof(dmspec.SectorStart), 0, ""},
	{"dm_target_spec", "length", unsafe.Offsetof(dmspec.Length), 8, ""},
	{"dm_target_spec", "status", unsafe.Offsetof(dmspec.Status), 16, ""},
	{"dm_target_spec", "next", unsafe.Offsetof(dmspec.Next), 20, ""},
	{"dm_target_spec", "target_type", unsafe.Offsetof(dmspec.TargetType), 24, ""},
	{"dm_target_deps", "", unsafe.Sizeof(dmdeps), 8, ""},
	{"dm_target_deps", "count", unsafe.Offsetof(dmdeps.Count), 0, ""},
	{"dm_name_list", "dev", unsafe.Offsetof(dmname.Dev), 0, ""},
	{"dm_name_list", "next", unsafe.Offsetof(dmname.Next), 8, ""},

	{"ublksrv_ctrl_cmd", "", unsafe.Sizeof(ctrl), 32, ""},
	{"ublksrv_ctrl_cmd", "dev_id", unsafe.Offsetof(ctrl.DevID), 0, ""},
	{"ublksrv_ctrl_cmd", "queue_id", unsafe.Offsetof(ctrl.QueueID), 4, ""},
	{"ublksrv_ctrl_cmd", "len", unsafe.Offsetof(ctrl.Len), 6, ""},
	{"ublksrv_ctrl_cmd", "addr", unsafe.Offsetof(ctrl.Addr), 8, ""},
	{"ublksrv_ctrl_cmd", "data", unsafe.Offsetof(ctrl.Data), 16, ""},
	{"ublksrv_ctrl_cmd", "dev_path_len", unsafe.Offsetof(ctrl.DevPathLen), 24, "UBLK_U_CMD_GET_DEV_INFO2"},

	{"ublksrv_ctrl_dev_info", "", unsafe.Sizeof(info), 64, ""},
	{"ublksrv_ctrl_dev_info", "nr_hw_queues", unsafe.Offsetof(info.NrHwQueues), 0, ""},
	{"ublksrv_ctrl_dev_info", "queue_depth", unsafe.Offsetof(info.QueueDepth), 2, ""},
	{"ublksrv_ctrl_dev_info", "state", unsafe.Offsetof(info.State), 4, ""},
	{"ublksrv_ctrl_dev_info", "max_io_buf_bytes", unsafe.Offsetof(info.MaxIOBufBytes), 8, ""},
	{"ublksrv_ctrl_dev_info", "dev_id", unsafe.Offsetof(info.DevID), 12, ""},
	{"ublksrv_ctrl_dev_info", "ublksrv_pid", unsafe.Offsetof(info.UblksrvPid), 16, ""},
	{"ublksrv_ctrl_dev_info", "flags", unsafe.Offsetof(info.Flags), 24, ""},
	{"ublksrv_ctrl_dev_info", "ublksrv_flags", unsafe.Offsetof(info.UblksrvFlags), 32, ""},
	{"ublksrv_ctrl_dev_info", "owner_uid", unsafe.Offsetof(info.OwnerUID), 40, "UBLK_F_UNPRIVILEGED_DEV"},
	{"ublksrv_ctrl_dev_info", "owner_gid", unsafe.Offsetof(info.OwnerGID), 44, "UBLK_F_UNPRIVILEGED_DEV"},

	{"ublksrv_io_desc", "", unsafe.Sizeof(desc), 24, ""},
	{"ublksrv_io_desc", "op_flags", unsafe.Offsetof(desc.OpFlags), 0, ""},
	{"ublksrv_io_desc", "nr_sectors", unsafe.Offsetof(desc.NrSectors), 4, ""},
	{"ublksrv_io_desc", "start_sector", unsafe.Offsetof(desc.StartSector), 8, ""},
	{"ublksrv_io_desc", "addr", unsafe.Offsetof(desc.Addr), 16, ""},

	{"ublksrv_io_cmd", "", unsafe.Sizeof(iocmd), 16, ""},
	{"ublksrv_io_cmd", "q_id", unsafe.Offsetof(iocmd.QID), 0, ""},
	{"ublksrv_io_cmd", "tag", unsafe.Offsetof(iocmd.Tag), 2, ""},
	{"ublksrv_io_cmd", "result", unsafe.Offsetof(iocmd.Result), 4, ""},
	{"ublksrv_io_cmd", "addr", unsafe.Offsetof(iocmd.Addr), 8, ""},

	{"ublk_auto_buf_reg", "", unsafe.Sizeof(auto), 8, "UBLK_F_AUTO_BUF_REG"},
	{"ublk_auto_buf_reg", "index", unsafe.Offsetof(auto.Index), 0, "UBLK_F_AUTO_BUF_REG"},
	{"ublk_auto_buf_reg", "flags", unsafe.Offsetof(auto.Flags), 2, "UBLK_F_AUTO_BUF_REG"},
	{"ublk_auto_buf_reg", "reserved1", unsafe.Offsetof(auto.Reserved1), 4, "UBLK_F_AUTO_BUF_REG"},

	{"ublk_param_basic", "", unsafe.Sizeof(basic), 32, ""},
	{"ublk_param_basic", "attrs", unsafe.Offsetof(basic.Attrs), 0, ""},
	{"ublk_param_basic", "logical_bs_shift", unsafe.Offsetof(basic.LogicalBsShift), 4, ""},
	{"ublk_param_basic", "physical_bs_shift", unsafe.Offsetof(basic.PhysicalBsShift), 5, ""},
	{"ublk_param_basic", "io_opt_shift", unsafe.Offsetof(basic.IOOptShift), 6, ""},
	{"ublk_param_basic", "io_min_shift", unsafe.Offsetof(basic.IOMinShift), 7, ""},
	{"ublk_param_basic", "max_sectors", unsafe.Offsetof(basic.MaxSectors), 8, ""},
	{"ublk_param_basic", "chunk_sectors", unsafe.Offsetof(basic.ChunkSectors), 12, ""},
	{"ublk_param_basic", "dev_sectors", unsafe.Offsetof(basic.DevSectors), 16, ""},
	{"ublk_param_basic", "virt_boundary_mask", unsafe.Offsetof(basic.VirtBoundaryMask), 24, ""},

	{"ublk_param_discard", "", unsafe.Sizeof(disc), 20, ""},
	{"ublk_param_discard", "discard_alignment", unsafe.Offsetof(disc.DiscardAlignment), 0, ""},
	{"ublk_param_discard", "discard_granularity", unsafe.Offsetof(disc.DiscardGranularity), 4, ""},
	{"ublk_param_discard", "max_discard_sectors", unsafe.Offsetof(disc.MaxDiscardSectors), 8, ""},
	{"ublk_param_discard", "max_write_zeroes_sectors", unsafe.Offsetof(disc.MaxWriteZeroesSectors), 12, ""},
	{"ublk_param_discard", "max_discard_segments", unsafe.Offsetof(disc.MaxDiscardSegments), 16, ""},

	{"ublk_param_devt", "", unsafe.Sizeof(devt), 16, "UBLK_PARAM_TYPE_DEVT"},
	{"ublk_param_devt", "disk_major", unsafe.Offsetof(devt.DiskMajor), 8, "UBLK_PARAM_TYPE_DEVT"},
	{"ublk_param_zoned", "", unsafe.Sizeof(zoned), 32, "UBLK_PARAM_TYPE_ZONED"},
	{"ublk_param_dma_align", "", unsafe.Sizeof(dma), 8, "UBLK_PARAM_TYPE_DMA_ALIGN"},
	{"ublk_param_segment", "", unsafe.Sizeof(seg), 16, "UBLK_PARAM_TYPE_SEGMENT"},
	{"ublk_param_segment", "max_segment_size", unsafe.Offsetof(seg.MaxSegmentSize), 8, "UBLK_PARAM_TYPE_SEGMENT"},
	{"ublk_param_segment", "max_segments", unsafe.Offsetof(seg.MaxSegments), 12, "UBLK_PARAM_TYPE_SEGMENT"},
	{"ublk_param_integrity", "", unsafe.Sizeof(integ), 16, "UBLK_PARAM_TYPE_INTEGRITY"},
	{"ublk_param_integrity", "metadata_size", unsafe.Offsetof(integ.MetadataSize), 7, "UBLK_PARAM_TYPE_INTEGRITY"},

	{"ublk_params", "", unsafe.Sizeof(params), 152, "UBLK_PARAM_TYPE_INTEGRITY"},
	{"ublk_params", "len", unsafe.Offsetof(params.Len), 0, ""},
	{"ublk_params", "types", unsafe.Offsetof(params.Types), 4, ""},
	{"ublk_params", "basic", unsafe.Offsetof(params.Basic), 8, ""},
	{"ublk_params", "discard", unsafe.Offsetof(params.Discard), 40, ""},
	{"ublk_params", "devt", unsafe.Offsetof(params.Devt), 60, "UBLK_PARAM_TYPE_DEVT"},
	{"ublk_params", "zoned", unsafe.Offsetof(params.Zoned), 76, "UBLK_PARAM_TYPE_ZONED"},
	{"ublk_params", "dma", unsafe.Offsetof(params.DMA), 108, "UBLK_PARAM_TYPE_DMA_ALIGN"},
	{"ublk_params", "seg", unsafe.Offsetof(params.Seg), 120, "UBLK_PARAM_TYPE_SEGMENT"},
	{"ublk_params", "integrity", unsafe.Offsetof(params.Integrity), 136, "UBLK_PARAM_TYPE_INTEGRITY"},
}

func (p place) key() string { return p.c + "." + p.field }

func TestGolden(t *testing.T) {
	for _, n := range numbers {
		if n.got != n.golden {
			t.Errorf("%s = %#x, want %#x", n.name, n.got, n.golden)
		}
	}
	for _, p := range places {
		if p.got != p.golden {
			t.Errorf("%s at %d, want %d", p.key(), p.got, p.golden)
		}
	}
}

// TestHeader asks the C compiler what the host's headers say of everything
// that they have.
func TestHeader(t *testing.T) {
	cc, err := exec.LookPath("cc")
	if err != nil {
		t.Skip("no C compiler: install cc and linux-libc-dev")
	}
	if _, err := os.Stat("/usr/include/linux/ublk_cmd.h"); err != nil {
		t.Skip("no linux/ublk_cmd.h: install linux-libc-dev")
	}

	var c strings.Builder
	c.WriteString("#include <stdio.h>\n#include <stddef.h>\n#include <errno.h>\n")
	c.WriteString("#include <linux/blkpg.h>\n#include <linux/dm-ioctl.h>\n#include <linux/fs.h>\n#include <linux/ublk_cmd.h>\nint main(void) {\n")
	for _, n := range numbers {
		fmt.Fprintf(&c, "#ifdef %[1]s\nprintf(\"%[1]s %%llu\\n\", (unsigned long long)(%[1]s));\n#endif\n", n.name)
	}
	for _, p := range places {
		expr := fmt.Sprintf("offsetof(struct %s, %s)", p.c, p.field)
		if p.field == "" {
			expr = fmt.Sprintf("sizeof(struct %s)", p.c)
		}
		line := fmt.Sprintf("printf(\"%s %%llu\\n\", (unsigned long long)%s);\n", p.key(), expr)
		if p.since != "" {
			line = fmt.Sprintf("#ifdef %s\n%s#endif\n", p.since, line)
		}
		c.WriteString(line)
	}
	c.WriteString("return 0; }\n")

	dir := t.TempDir()
	src, bin := filepath.Join(dir, "probe.c"), filepath.Join(dir, "probe")
	if err := os.WriteFile(src, []byte(c.String()), 0o600); err != nil {
		t.Fatal(err)
	}
	if out, err := exec.Command(cc, "-o", bin, src).CombinedOutput(); err != nil {
		t.Fatalf("compile the probe: %v\n%s", err, out)
	}
	out, err := exec.Command(bin).Output()
	if err != nil {
		t.Fatalf("run the probe: %v", err)
	}
	said := map[string]uint64{}
	for _, line := range strings.Split(strings.TrimSpace(string(out)), "\n") {
		name, val, _ := strings.Cut(line, " ")
		v, err := strconv.ParseUint(val, 10, 64)
		if err != nil {
			t.Fatalf("probe said %q: %v", line, err)
		}
		said[name] = v
	}

	checked := 0
	for _, n := range numbers {
		if v, ok := said[n.name]; ok {
			checked++
			if v != n.got {
				t.Errorf("%s = %#x, the header says %#x", n.name, n.got, v)
			}
		}
	}
	for _, p := range places {
		if v, ok := said[p.key()]; ok {
			checked++
			if v != uint64(p.got) {
				t.Errorf("%s at %d, the header says %d", p.key(), p.got, v)
			}
		}
	}
	// The header of Linux 6.1, an old one, has more than these.
	if checked < 60 {
		t.Errorf("only %d of %d facts compared with the header", checked, len(numbers)+len(places))
	}
	t.Logf("%d of %d facts compared with the header", checked, len(numbers)+len(places))
}

func TestAutoBufRegAddr(t *testing.T) {
	r := UblkAutoBufReg{Index: 0x1234, Flags: 0x56, Reserved0: 0x78, Reserved1: 0x9abcdef0}
	if got, want := r.SqeAddr(), uint64(0x9abcdef0_78561234); got != want {
		t.Errorf("sqe.addr = %#x, want %#x", got, want)
	}
}
