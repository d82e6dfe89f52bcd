// Package ublk makes block devices whose requests this process serves, through
// the kernel's ublk driver.
//
//	 /dev/ublk-control             /dev/ublkcN               /dev/ublkbN
//	       ^                            ^                         ^
//	       │ commands                   │ fetch, commit           │ requests
//	 Control: 1 thread      queue: 1 thread and ring each     any program
//	       ^                            │
//	Add, Claim, Device              Handler.Handle(Request)
//
// OpenControl loads the driver and says what is missing. Add makes a device. The
// device's parameters come from a Geometry, and its requests go to one Handler for
// each queue. A queue's thread is a blockdev.Queue, on which the handler starts
// operations of its own. Device.TryStop and Device.Delete end the device again. A
// device made with recovery outlives its process. Another one takes it over by Claim,
// Claimed.Prepare and Device.Resume.
//
// The package knows devices by their numbers, and nothing of what is on them. Its
// caller tells it who uses a disk: see Config.OpenedBy.
//
// # Requests
//
// A handler is called inline, on the queue's thread. It completes the request
// there, at once or from the completion of an operation. Nothing is allocated,
// locked or handed to another goroutine on the way. Several requests are fetched,
// and several results given back, in one system call of the ring.
//
// Every request is completed exactly once. The package panics if a handler
// completes one twice, or if the kernel refuses a result. When the process dies,
// the kernel fails its requests, or keeps them for the next server.
//
// # Payloads
//
// With ModeCopy the kernel copies a request's payload into or out of the tag's
// buffer, which is registered with the queue's ring. With ModeZeroCopy the kernel
// registers the request's own pages there. Either way the payload is a
// blockdev.Buf with the tag as its index. So a handler that only passes the payload
// on to operations of its queue need not know the mode. A handler that looks at the
// bytes needs ModeCopy.
//
// # Threads
//
// A queue's thread waits for the kernel without telling the Go scheduler. So the
// package keeps GOMAXPROCS above the number of queues as devices come and go. Call
// no function of this package on a queue's thread, because most of them wait for
// the queues. A process that serves disks calls PrepareProcess first.
//
// A Control has one thread for the driver's commands. The Control and every Device
// may be used from any goroutine at once. Lock order: Device.mu, then Control.mu,
// which is never held while the kernel works.
//
// # Errors
//
// To be tested for with errors.Is:
//
//   - ErrNoDriver, ErrTooOld, ErrPermission: this machine cannot have a ublk device,
//     or not of the kind that was asked for. The message says what to do. So do the
//     messages of uring.ErrDisabled and uring.ErrNotSupported.
//   - ErrBusy: the device is in use, or another process serves it.
//   - ErrZoned: a zoned disk, whose shape cannot be passed through.
//   - ErrClosed: the Control has been closed.
//   - the errno of a control command: unix.ENODEV if there is no such device.
//   - the error of a context: the command or the wait was given up. Each function
//     says what becomes of the device then.
package ublk
