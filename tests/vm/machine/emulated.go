package machine

// What is said to QEMU and to the kernel so that emulated processors, which most machines here have, do little that no
// test is about.

// kernelLine is the command line of the guest's kernel. A bug of the kernel ends the machine at once. On a busy host an
// emulated timer may be late: the kernel is told not to panic at boot nor to give up the TSC for that. The other processors
// come later: init.sh says why. Measuring how fast each of them loops would take 6.12 seconds; lpj is about what 2.5 GHz
// give. The hardening that is off (memory zeroed as it is taken, checks of copies, a random place for the kernel, security
// modules, audit) is nothing that ublk or io_uring depends on, and a large part of the work of an emulated processor. So
// is to set a timer anew for each sleep, of which each wakes QEMU's main loop twice: see Config.FineTimers.
func kernelLine(cfg Config) string {
	line := "console=ttyS0 quiet loglevel=5 panic=-1 oops=panic mitigations=off tsc=reliable no_timer_check " +
		"maxcpus=1 lpj=10000000 init_on_alloc=0 hardened_usercopy=off nokaslr apparmor=0 audit=0"
	if cfg.Accel == TCG && !cfg.FineTimers {
		line += " nohz=off highres=off"
	}
	return line
}

func accelOption(accel string) string {
	if accel == TCG {
		return "tcg,thread=multi"
	}
	return accel
}

// cpuOption leaves out what makes an emulated processor slow: string moves of one byte a turn (erms, fsrm), which the
// kernel takes for quick ones and clears and copies memory with, a fifth level of page tables, switches of what the
// kernel may touch (smap, smep, pku), of which each ends a block of translated code, and registers of 256 bits (xsave,
// avx), which are saved at each change of threads. In sum a third of the work.
func cpuOption(accel string) string {
	if accel == KVM {
		return "host"
	}
	return "max,erms=off,fsrm=off,la57=off,smap=off,smep=off,pku=off,xsave=off,avx=off,avx2=off"
}

// serialDevice has no more ports than are used: QEMU's main loop polls a descriptor for each.
const serialDevice = "virtio-serial-pci,max_ports=4,ioeventfd=off"

// hugeHeap puts QEMU's tables into huge pages: it looks up translated code in them all the time.
const hugeHeap = "GLIBC_TUNABLES=glibc.malloc.hugetlb=1"
