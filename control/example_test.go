package control_test

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"net"
	"net/http"
	"os"
	"path/filepath"

	"github.com/ublk-blksnap/ublk-blksnap/control"
)

// A backup program asks what changed of a disk since its last snapshot, and reads
// these ranges of the image. The daemon of this example knows the answers by heart.
func Example() {
	socket, stop := fakeDaemon()
	defer stop()
	client := control.NewClient(socket) // control.DefaultSocket, usually
	defer client.Close()
	ctx := context.Background()

	snapshot, err := client.CreateSnapshot(ctx, control.CreateRequest{
		Devices: []string{"vdb"},
		Storage: []control.Storage{{Path: "/var/tmp"}},
		Take:    true,
	})
	if err != nil {
		fmt.Println(err)
		return
	}
	image := snapshot.Images[0]
	fmt.Println("read", image.Path)

	last, err := control.ParseTake("02e091ec-dae8-41ba-9dae-4e66f1473dd6:6")
	if err != nil {
		fmt.Println(err)
		return
	}
	_, err = client.CBTChanges(ctx, control.ChangesRequest{Device: image.Device, Since: last}, func(r control.Range) error {
		fmt.Printf("%d sectors from sector %d\n", r.Count, r.Sector)
		return nil
	})
	if control.CodeOf(err) == control.GenerationEnded {
		fmt.Println("everything has to be read")
	} else if err != nil {
		fmt.Println(err)
		return
	}
	fmt.Println("next time since", image.Take)

	_, err = client.RemoveDevice(ctx, control.RemoveRequest{Device: "vdb"})
	var failed *control.Error
	if errors.As(err, &failed) {
		fmt.Println(failed.Code, "-", failed)
	}

	// Output:
	// read /dev/ublkb1
	// 8 sectors from sector 2048
	// 16 sectors from sector 4096
	// next time since 02e091ec-dae8-41ba-9dae-4e66f1473dd6:7
	// busy - remove vdb: held by snapshot 5f8a: destroy it first
}

// fakeDaemon answers some calls on a socket.
func fakeDaemon() (socket string, stop func()) {
	dir, err := os.MkdirTemp("", "control-example-")
	if err != nil {
		panic(err)
	}
	socket = filepath.Join(dir, "control.sock")
	l, err := net.Listen("unix", socket)
	if err != nil {
		panic(err)
	}
	var mux http.ServeMux
	mux.HandleFunc("POST /v1/snapshot/create", func(w http.ResponseWriter, _ *http.Request) {
		take, _ := control.ParseTake("02e091ec-dae8-41ba-9dae-4e66f1473dd6:7")
		_ = json.NewEncoder(w).Encode(control.Snapshot{
			ID: "5f8a", State: control.SnapshotTaken,
			Images: []control.SnapshotImage{{Device: "vdb", Original: "/dev/vdb", Path: "/dev/ublkb1", Take: &take}},
		})
	})
	mux.HandleFunc("POST /v1/cbt/changes", func(w http.ResponseWriter, _ *http.Request) {
		answer := json.NewEncoder(w)
		_ = answer.Encode(control.RangeLine{Range: &control.Range{Sector: 2048, Count: 8}})
		_ = answer.Encode(control.RangeLine{Range: &control.Range{Sector: 4096, Count: 16}})
		_ = answer.Encode(control.LastLine{Info: &control.CBTInfo{BlockSize: 65536}})
	})
	mux.HandleFunc("POST /v1/device/remove", func(w http.ResponseWriter, _ *http.Request) {
		w.WriteHeader(http.StatusConflict)
		_ = json.NewEncoder(w).Encode(&control.Error{Code: control.Busy, Message: "remove vdb: held by snapshot 5f8a", Fix: "destroy it first"})
	})
	server := &http.Server{Handler: &mux}
	go func() { _ = server.Serve(l) }()
	return socket, func() {
		_ = server.Close()
		_ = os.RemoveAll(dir)
	}
}
