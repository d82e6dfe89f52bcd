package controltest

import (
	"bufio"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"syscall"
	"time"

	"github.com/ublk-blksnap/ublk-blksnap/control"
)

// Try sends a request to the daemon at socket. It fails unless the daemon refuses the
// request, in a way that says why.
func Try(socket string, q Request, patience time.Duration) error {
	conn, err := net.Dial("unix", socket)
	if err != nil {
		return err
	}
	defer conn.Close()
	if err := conn.SetDeadline(time.Now().Add(patience)); err != nil {
		return err
	}
	// The daemon may have seen enough, and have gone.
	if _, err := conn.Write(q.Raw); err != nil && !hungUp(err) {
		return fmt.Errorf("%v: send: %w", q, err)
	}
	switch q.Then {
	case Leave:
		return nil
	case Half:
		if err := conn.(*net.UnixConn).CloseWrite(); err != nil && !hungUp(err) {
			return fmt.Errorf("%v: %w", q, err)
		}
	case Read:
	}
	resp, err := http.ReadResponse(bufio.NewReader(conn), nil)
	if hungUp(err) {
		return nil // as it does with what is no HTTP
	}
	if err != nil {
		return fmt.Errorf("%v: read the answer: %w", q, err)
	}
	body, err := io.ReadAll(io.LimitReader(resp.Body, 1<<20))
	if err != nil && !hungUp(err) {
		return fmt.Errorf("%v: read the answer: %w", q, err)
	}
	if resp.StatusCode < 300 || resp.StatusCode == http.StatusInternalServerError {
		return fmt.Errorf("%v: %s: %.500s", q, resp.Status, body)
	}
	if resp.Header.Get("Content-Type") != "application/json" {
		return nil // the answer of package http
	}
	var e control.Error
	if err := json.Unmarshal(body, &e); err != nil && len(body) > 0 || len(body) > 0 && (e.Code == "" || e.Message == "") {
		return fmt.Errorf("%v: %s: answered by %.500q: %w", q, resp.Status, body, err)
	}
	return nil
}

// hungUp says whether the other side has ended the connection.
func hungUp(err error) bool {
	return errors.Is(err, io.EOF) || errors.Is(err, io.ErrUnexpectedEOF) || errors.Is(err, syscall.EPIPE) || errors.Is(err, syscall.ECONNRESET)
}
