// Package controltest makes requests that no client of the daemon sends: broken HTTP,
// broken JSON, and values that mean nothing. Whoever serves the API refuses them all.
package controltest

import (
	"bytes"
	"encoding/json"
	"fmt"
	"math/rand/v2"
	"strings"
)

// Request is one malformed request, as it goes over the socket.
type Request struct {
	Kind string
	Raw  []byte
	Then Then
}

func (r Request) String() string { return fmt.Sprintf("%s: %.200q", r.Kind, r.Raw) }

// Then is what the caller does after he has sent a request.
type Then int

// What a caller does.
const (
	Read  Then = iota // he reads the answer to its end
	Half              // the same, but nothing more will come from him
	Leave             // he goes without reading
)

// Known are things that there are. Malformed requests name them beside what is wrong,
// because what is not there is refused before anybody looks at the rest.
type Known struct {
	Device     string // a filter's name, and a path of it
	Path       string
	Snapshot   string // the UUID of a snapshot that is taken
	Generation string // of the device's change map
	Sectors    uint64 // of the device
	// Snapshots: the daemon can make a snapshot, which some of the requests come as far as.
	Snapshots bool
}

// paths are all calls of the API.
var paths = []string{
	"info", "stop", "reload", "device/add", "device/remove", "device/list", "device/status", "cbt/info", "cbt/map", "cbt/changes",
	"cbt/mark", "snapshot/create", "snapshot/add", "snapshot/append", "snapshot/take", "snapshot/set", "snapshot/destroy", "snapshot/list",
	"snapshot/info", "snapshot/wait", "snapshot/watch",
}

// Malformed is a malformed request that r chooses.
func Malformed(r *rand.Rand, k Known) Request {
	kinds := []func(*rand.Rand, Known) Request{method, path, truncated, huge, wrongType, notJSON, deep, header, lengths, absurd, absurd, absurd, absurd}
	return pick(r, kinds)(r, k)
}

func pick[T any](r *rand.Rand, from []T) T { return from[r.IntN(len(from))] }

func post(path, contentType string, body []byte) []byte {
	return fmt.Appendf(nil, "POST /v1/%s HTTP/1.1\r\nHost: d\r\nConnection: close\r\nContent-Type: %s\r\nContent-Length: %d\r\n\r\n%s", path, contentType, len(body), body)
}

var contentTypes = []string{"application/json", "application/json", "text/plain", "multipart/form-data; boundary=x", "", "application/x-www-form-urlencoded", "\x01/\x02"}

func json1(r *rand.Rand, kind, path, body string) Request {
	return Request{Kind: kind, Raw: post(path, pick(r, contentTypes[:6]), []byte(body)), Then: pick(r, []Then{Read, Read, Half, Leave})}
}

// method: another than POST, or none.
func method(r *rand.Rand, _ Known) Request {
	m := pick(r, []string{"GET", "PUT", "DELETE", "PATCH", "HEAD", "OPTIONS", "TRACE", "post", "BREW", "PRI", "P\x00ST", "", " POST", strings.Repeat("M", 5000)})
	return Request{Kind: "method", Raw: fmt.Appendf(nil, "%s /v1/%s HTTP/1.1\r\nHost: d\r\nConnection: close\r\nContent-Length: 2\r\n\r\n{}", m, pick(r, paths))}
}

// path: a call that does not exist, or an address that is none.
func path(r *rand.Rand, _ Known) Request {
	p := pick(r, []string{
		"/", "", "*", "v1/info", "/v1", "/v1/", "//v1//info/..//stop", "/v1/stop/", "/v1/stop/../nothing", "/v2/stop", "/v1/device/remove/data", "/v1/%73top%00", "/v1/%zz",
		"http://elsewhere/v1/nothing", "/v1/device/add%2f..%2f..%2fstop", "/V1/STOP", "/v1/" + strings.Repeat("a/", 2000), "/v1/\xff\xfe", "/v1/stop?\r\nX: y", "/v1/cbt", "/metrics/../v1/nothing",
	})
	return Request{Kind: "path", Raw: fmt.Appendf(nil, "POST %s HTTP/1.1\r\nHost: d\r\nConnection: close\r\nContent-Length: 2\r\n\r\n{}", p)}
}

// whole is the body of a request that would be in order.
func whole(r *rand.Rand, k Known) (path string, body []byte) {
	type object = map[string]any
	m := map[string]object{
		"reload":          {"program": "/bin/true"},
		"device/add":      {"path": k.Path, "name": "n", "queues": 1, "depth": 2, "mode": "copy", "attach": "never", "dry_run": true, "intent_log": false, "intent_log_zone": 1 << 20},
		"device/remove":   {"device": k.Device, "force": true},
		"device/status":   {"device": k.Device},
		"cbt/info":        {"device": k.Device},
		"cbt/map":         {"device": k.Device},
		"cbt/changes":     {"device": k.Device, "since": k.Generation + ":1"},
		"cbt/mark":        {"device": k.Device, "ranges": []any{object{"sector": 0, "count": 8}, object{"sector": 16, "count": 8}}},
		"snapshot/create": {"devices": []string{k.Device}, "storage": []any{object{"path": "/tmp", "limit": 1 << 20}}, "chunk_size": 4096, "take": true},
		"snapshot/add":    {"id": k.Snapshot, "device": k.Device, "attach": true},
		"snapshot/append": {"id": k.Snapshot, "path": "/tmp", "limit": 1 << 20},
		"snapshot/take":   {"id": k.Snapshot, "no_freeze": true},
		"snapshot/set":    {"id": k.Snapshot, "ttl_ns": 1},
		// These end what is there: the whole bodies are never sent.
		"snapshot/destroy": {"id": k.Snapshot},
		"snapshot/info":    {"id": k.Snapshot},
		"snapshot/wait":    {"id": k.Snapshot, "timeout_ns": 5},
		"snapshot/watch":   {"id": k.Snapshot, "since": 1},
	}
	for path = pick(r, paths); m[path] == nil; path = pick(r, paths) {
	}
	body, err := json.Marshal(m[path])
	if err != nil {
		panic(err)
	}
	return path, body
}

// truncated: a body of which the end is missing, announced as what it is or as it should
// have been.
func truncated(r *rand.Rand, k Known) Request {
	path, body := whole(r, k)
	cut := body[:1+r.IntN(len(body)-1)]
	if r.IntN(2) == 0 {
		return json1(r, "truncated", path, string(cut))
	}
	raw := post(path, "application/json", body)
	return Request{Kind: "broken off", Raw: raw[:len(raw)-len(body)+len(cut)], Then: pick(r, []Then{Half, Leave})}
}

// huge: more than a request may have, or a name that is.
func huge(r *rand.Rand, _ Known) Request {
	long := strings.Repeat(pick(r, []string{"x", "\\u0041", "\\\\", "9", " "}), 70<<10)
	path := pick(r, paths)
	body := pick(r, []string{`{"device":"%s"}`, `{"id":"%s"}`, `{"%s":1}`, `{"ranges":[%s`, `%s`, `{"devices":["%s"]}`, `[%s]`})
	return json1(r, "huge", path, strings.Replace(body, "%s", long, 1))
}

// wrongType: a value of another type than the field's, or a field that does not exist.
func wrongType(r *rand.Rand, k Known) Request {
	path, body := whole(r, k)
	var fields map[string]json.RawMessage
	if err := json.Unmarshal(body, &fields); err != nil {
		panic(err)
	}
	if r.IntN(3) == 0 {
		fields[pick(r, []string{"", "devcie", "FORCE!", "__proto__", "\x00", "Device ", "idd", strings.Repeat("f", 3000)})] = json.RawMessage(`1`)
	} else {
		// Of no field's type.
		wrong := pick(r, []string{`{"a":[{}]}`, `[[]]`, `1.5`, `-1e999`, `1e400`, `{"":{"":null}}`, `[true,"x",{}]`, `0.1`})
		names := make([]string, 0, len(fields))
		for name := range fields {
			names = append(names, name)
		}
		// Not by the order of the map, which no seed decides.
		var least string
		for _, name := range names {
			if least == "" || name < least {
				least = name
			}
		}
		fields[least] = json.RawMessage(wrong)
	}
	changed, err := json.Marshal(fields)
	if err != nil { // not a number that JSON knows
		return json1(r, "wrong type", path, string(body[:len(body)-1])+`,"x":1e400}`)
	}
	return json1(r, "wrong type", path, string(changed))
}

// notJSON: something else, or more than one value.
func notJSON(r *rand.Rand, _ Known) Request {
	noise := make([]byte, 1+r.IntN(200))
	for i := range noise {
		noise[i] = byte(r.UintN(256))
	}
	body := pick(r, []string{
		"\x00", "}{", "NaN", "{\"device\":NaN}", "{'device':'x'}", "device=data&force=true", "<a/>", `{"device":"\x"}`, `{"device":"` + "\xff\n" + `"}`, `{}{}`, `{} []`, `{},`, `[]`, `"x"`, `5`,
		`true`, "\ufeff{}", "{\"device\":\"\\ud800\"}x", "\x01" + string(noise),
	})
	return json1(r, "not JSON", pick(r, paths), body)
}

// deep: values inside of values.
func deep(r *rand.Rand, _ Known) Request {
	n := pick(r, []int{100, 5000, 20000, 60000})
	if r.IntN(2) == 0 {
		return json1(r, "deep", pick(r, paths), strings.Repeat("[", n))
	}
	n = min(n, 10000)
	return json1(r, "deep", pick(r, paths), strings.Repeat(`{"a":`, n)+"1"+strings.Repeat("}", n))
}

// header: too many, too long, or none that HTTP knows.
func header(r *rand.Rand, _ Known) Request {
	h := pick(r, []string{
		strings.Repeat("X-A: b\r\n", 3000), "X: " + strings.Repeat("y", 20<<10) + "\r\n", "No colon\r\n", ": empty\r\n", "X\x00: y\r\n", " X: folded\r\n", "Host: two\r\nHost: three\r\n", "Bad Name: y\r\n",
		"X: a\rb\r\n", "Transfer-Encoding: nonsense\r\n",
	})
	return Request{Kind: "header", Raw: fmt.Appendf(nil, "POST /v1/%s HTTP/1.1\r\nHost: d\r\nConnection: close\r\n%sContent-Length: 1\r\n\r\n[", pick(r, paths), h)}
}

// lengths: a length that is none, or two, chunks that are none, or another protocol.
func lengths(r *rand.Rand, _ Known) Request {
	raw := pick(r, []string{
		"POST /v1/%s HTTP/1.1\r\nHost: d\r\nContent-Length: -1\r\n\r\n[", "POST /v1/%s HTTP/1.1\r\nHost: d\r\nContent-Length: 99999999999999999999\r\n\r\n[",
		"POST /v1/%s HTTP/1.1\r\nHost: d\r\nContent-Length: 1\r\nContent-Length: 2\r\n\r\n[]", "POST /v1/%s HTTP/1.1\r\nHost: d\r\nTransfer-Encoding: chunked\r\n\r\nzz\r\n",
		"POST /v1/%s HTTP/1.1\r\nHost: d\r\nTransfer-Encoding: chunked\r\n\r\nffffffffffffffff\r\n[", "POST /v1/%s HTTP/1.1\r\nHost: d\r\nTransfer-Encoding: chunked\r\n\r\n1\r\n[\r\n5\r\n",
		"POST /v1/%s HTTP/9.9\r\nHost: d\r\n\r\n", "POST /v1/%s\r\n\r\n", "\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03 /v1/%s", "PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n%s", "\r\n\r\n\r\n%s",
		"POST /v1/%s HTTP/1.1\r\nHost: d\r\nContent-Length: 5\r\n\r\n[", "POST /v1/%s HTTP/1.1\r\n", "POST /v1/%s HT", "POST /v1/%s HTTP/1.1\r\nHost: d\r\nExpect: 200-maybe\r\nContent-Length: 1\r\n\r\n[",
	})
	return Request{Kind: "lengths", Raw: fmt.Appendf(nil, raw, pick(r, paths)), Then: pick(r, []Then{Half, Leave})}
}

// names that no device, and paths that no disk, has.
var names = []string{
	"", ".", "..", "/", "//", "../data", "../../etc/passwd", "images", "images/..", "a/b", "-x", "--force", "a b", "a\x00b", "\x00", "\n", "\x1b[2J", "\u202edata", "\ufffd",
	"/dev/null", "/dev", "/dev/zero", "/proc/self/mem", "/proc/self/root", "/proc/self/fd/0", "/sys", "/etc/passwd", "/dev/mapper/../null", "/dev/ublk-control", "/nothing/at/all",
	"relative/path", "0:0", "4294967296:1", "-1:-1", strings.Repeat("n", 65), strings.Repeat("/d", 3000), strings.Repeat("../", 2000) + "dev/null", "%s%n", "$(reboot)", "{}", "null",
}

// absurd: what is well written and means nothing.
func absurd(r *rand.Rand, k Known) Request {
	// An end of JSON that adds something is part of the value.
	name, id := jsonText(pick(r, names)), jsonText(pick(r, append(names, "00000000-0000-0000-0000-000000000000", "ffffffff-ffff-ffff-ffff-ffffffffffff", "urn:uuid:"+k.Snapshot+"x", k.Device)))
	device, snapshot, path := jsonText(k.Device), jsonText(k.Snapshot), jsonText(k.Path)
	number := pick(r, []string{"-1", "-9223372036854775808", "9223372036854775807", "9223372036854775808", "18446744073709551615", "18446744073709551616", "1e18", "2147483648", "4294967296", "-0.0"})
	wide := pick(r, []string{"-1", "9223372036854775807", "18446744073709551615", "18446744073709551616", "36028797018963968", fmt.Sprint(k.Sectors), fmt.Sprint(k.Sectors + 1)})
	odd := pick(r, []string{"1", "3", "511", "513", "5120", "-4096", "9223372036854775807", "4611686018427387904", "1000000007"})
	calls := [][2]string{
		{"device/add", `{"path":` + name + `}`}, {"device/add", `{"path":` + path + `,"name":` + jsonText(pick(r, []string{"a/b", "..", "images", "-x", "\x00", strings.Repeat("n", 65)})) + `}`},
		{"device/add", `{"path":` + path + `,"queues":` + number + `}`}, {"device/add", `{"path":` + path + `,"depth":` + number + `}`}, {"device/add", `{"path":` + path + `,"mode":"fast"}`},
		{"device/add", `{"path":` + path + `,"intent_log_zone":` + odd + `}`}, {"device/add", `{"path":` + path + `,"attach":` + jsonText(pick(r, names[1:])) + `}`},
		{"device/add", `{"path":` + name + `,"dry_run":true}`}, {"device/add", `{"path":` + path + `,"queues":` + number + `,"dry_run":true}`},
		{"device/remove", `{"device":` + name + `,"force":true}`}, {"device/remove", `{"device":` + name + `}`}, {"device/status", `{"device":` + name + `}`},
		{"cbt/info", `{"device":` + name + `}`}, {"cbt/map", `{"device":` + name + `}`}, {"cbt/changes", `{"device":` + name + `,"since":"` + k.Generation + `:0"}`},
		{"cbt/changes", `{"device":` + device + `,"since":` + pick(r, []string{id, `"` + k.Generation + `:` + number + `"`, `"` + k.Generation + `:99"`, `"` + k.Generation + `"`, `7`, `"00000000-0000-0000-0000-000000000000:0"`}) + `}`},
		{"cbt/mark", `{"device":` + name + `,"ranges":[]}`}, {"cbt/mark", `{"device":` + device + `,"ranges":[{"sector":0,"count":1},{"sector":` + wide + `,"count":` + wide + `}]}`},
		{"cbt/mark", `{"device":` + device + `,"ranges":[{"sector":0,"count":0}]}`},
		{"snapshot/create", `{"devices":[` + name + `],"attach":true}`}, {"snapshot/create", `{"devices":[` + device + `,` + path + `]}`}, {"snapshot/create", `{"devices":[` + device + `],"chunk_size":` + odd + `}`},
		{"snapshot/add", `{"id":` + id + `,"device":` + device + `}`}, {"snapshot/add", `{"id":` + snapshot + `,"device":` + name + `,"attach":true}`}, {"snapshot/add", `{"id":` + snapshot + `,"device":` + device + `}`},
		{"snapshot/append", `{"id":` + id + `,"path":"/tmp"}`}, {"snapshot/append", `{"id":` + snapshot + `,"path":` + jsonText(pick(r, unstorable)) + `,"overwrite":true}`},
		{"snapshot/append", `{"id":` + snapshot + `,"path":"/tmp","limit":` + pick(r, []string{"-1", "1", "511"}) + `}`},
		{"snapshot/take", `{"id":` + id + `}`}, {"snapshot/take", `{"id":` + snapshot + `}`}, {"snapshot/destroy", `{"id":` + id + `}`}, {"snapshot/info", `{"id":` + id + `}`},
		{"snapshot/set", `{"id":` + id + `,"ttl_ns":1}`}, {"snapshot/set", `{"id":` + snapshot + `,"ttl_ns":` + pick(r, []string{"-1", "-9223372036854775808", "1e400", "0.5"}) + `}`},
		{"snapshot/create", `{"devices":[` + device + `],"name":` + jsonText(pick(r, []string{"a/b", "..", "latest", "\x00", "6b1f2c9e", k.Snapshot, strings.Repeat("n", 300)})) + `}`},
		{"snapshot/create", `{"devices":[` + device + `],"auto_append":{"path":` + jsonText(pick(r, []string{".", "relative", "/dev/null", "/dev/zero", "/nothing/at/all", "/\x00"})) + `,"reserve":5}}`},
		{"snapshot/create", `{"devices":[` + device + `],"auto_append":{"path":"/tmp","reserve":` + pick(r, []string{"-1", "100", "1e9"}) + `}}`},
		{"snapshot/create", `{"devices":[` + device + `],"ttl_ns":-1}`}, {"snapshot/create", `{"devices":[` + device + `],"labels":{"` + strings.Repeat("k", 60<<10) + `":5}}`},
		{"snapshot/wait", `{"id":` + id + `,"timeout_ns":` + number + `}`}, {"snapshot/wait", `{"id":` + snapshot + `,"timeout_ns":` + pick(r, []string{"-1", "-9223372036854775808", "0", "1"}) + `}`},
		{"snapshot/watch", `{"id":` + jsonText(pick(r, names[1:])) + `,"since":` + number + `}`}, {"reload", `{"program":` + jsonText(pick(r, names[1:])) + `}`},
	}
	if k.Snapshots {
		calls = append(calls, [][2]string{
			{"snapshot/create", `{"devices":[` + device + `],"take":true}`}, {"snapshot/create", `{"devices":[` + device + `],"storage":[{"path":` + jsonText(pick(r, unstorable)) + `}]}`},
			{"snapshot/create", `{"devices":[` + device + `],"storage":[{"path":"/tmp","limit":` + pick(r, []string{"-1", "1", "4095", "-9223372036854775808"}) + `}]}`},
		}...)
	}
	call := pick(r, calls)
	return json1(r, "absurd", call[0], call[1])
}

// unstorable are places where no snapshot can store anything.
var unstorable = []string{"", ".", "relative", "/dev/null", "/dev/zero", "/proc", "/proc/self/mem", "/sys/kernel", "/nothing/at/all", "/tmp\x00", "/dev/ublk-control", strings.Repeat("/d", 3000), "/\x00"}

func jsonText(s string) string {
	var b bytes.Buffer
	e := json.NewEncoder(&b)
	e.SetEscapeHTML(false)
	if err := e.Encode(s); err != nil {
		panic(err)
	}
	return strings.TrimSuffix(b.String(), "\n")
}
