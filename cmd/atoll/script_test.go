package main

import (
	"bytes"
	"context"
	"crypto/ed25519"
	"crypto/tls"
	"crypto/x509"
	"encoding/base64"
	"encoding/json"
	"encoding/pem"
	"errors"
	"fmt"
	"math/big"
	"net"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"strconv"
	"sync/atomic"
	"testing"
	"time"

	"github.com/rogpeppe/go-internal/testscript"
	"oras.land/oras-go/v2"
	"oras.land/oras-go/v2/registry/remote"
	"oras.land/oras-go/v2/registry/remote/auth"

	"github.com/atoll-registry/atoll/node"
)

func TestMain(m *testing.M) {
	testscript.Main(m, map[string]func(){"atoll": main})
}

// TestScripts runs the sessions in testdata, which show how each command is used
// and what it says. $HOST and $OTHER are loopback addresses that no other script
// uses. Besides the usual commands of scripts there are:
//
//	exits CODE atoll ARGS...   the command ends with this exit code
//	serving DIR                wait until a node serves with the data directory
//	wrote FILE                 wait until a file is there
//	awaits DIR REGEXP          wait until the cluster's status says it
//	push HOST/REPOSITORY:TAG   push a small artifact over plain HTTP
//	[!] pull HOST/REF VAR      its digest as a variable, or that it cannot be had
//	same A B                   two words are equal
//	field VAR FILE KEY         a variable from a JSON file
//	damage cut|flip|newer FILE what may happen to a bundle on its way
//	names ADDR CA NAME...      the server's certificate is good for the names
//	selfsigned CERT KEY NAME   make a certificate that no site signed
//	challenge URL CA [HOST]    print how the registry, asked as HOST, wants a login
func TestScripts(t *testing.T) {
	var scripts atomic.Int32
	deadline := time.Now().Add(4 * time.Minute)
	testscript.Run(t, testscript.Params{
		Dir:      "testdata",
		Deadline: deadline,
		Setup: func(e *testscript.Env) error {
			n, pid := scripts.Add(1), os.Getpid()
			for name, last := range map[string]int32{"HOST": 2 * n, "OTHER": 2*n + 1} {
				e.Setenv(name, fmt.Sprintf("127.%d.%d.%d", 1+pid>>8%200, pid%256, last))
			}
			for name, dir := range map[string]string{"HOME": "home", "XDG_CONFIG_HOME": "home/config", "XDG_DATA_HOME": "home/data"} {
				e.Setenv(name, filepath.Join(e.WorkDir, dir))
			}
			return os.Mkdir(filepath.Join(e.WorkDir, "home"), 0o700)
		},
		Cmds: map[string]func(*testscript.TestScript, bool, []string){
			"exits":   exits,
			"serving": func(ts *testscript.TestScript, _ bool, args []string) { serving(ts, args[0], deadline) },
			"awaits":  func(ts *testscript.TestScript, _ bool, args []string) { awaits(ts, args[0], args[1], deadline) },
			"wrote":   func(ts *testscript.TestScript, _ bool, args []string) { wrote(ts, args[0], deadline) },
			"push":    push,
			"pull":    pull,
			"field":   field,
			"same": func(ts *testscript.TestScript, _ bool, args []string) {
				if args[0] != args[1] {
					ts.Fatalf("%s is not %s", args[0], args[1])
				}
			},
			"damage":     damage,
			"names":      names,
			"challenge":  challenge,
			"selfsigned": selfsigned,
		},
	})
}

func exits(ts *testscript.TestScript, _ bool, args []string) {
	want, err := strconv.Atoi(args[0])
	ts.Check(err)
	err = ts.Exec(args[1], args[2:]...)
	code := 0
	if exit := (*exec.ExitError)(nil); errors.As(err, &exit) {
		code = exit.ExitCode()
	} else {
		ts.Check(err)
	}
	if code != want {
		ts.Fatalf("exit code %d, want %d", code, want)
	}
}

func serving(ts *testscript.TestScript, dir string, deadline time.Time) {
	socket := filepath.Join(ts.MkAbs(dir), node.SocketName)
	client := &http.Client{Timeout: 5 * time.Second, Transport: &http.Transport{
		DisableKeepAlives: true,
		DialContext: func(ctx context.Context, _, _ string) (net.Conn, error) {
			var d net.Dialer
			return d.DialContext(ctx, "unix", socket)
		},
	}}
	tick := time.NewTicker(20 * time.Millisecond)
	defer tick.Stop()
	end := time.NewTimer(min(time.Minute, time.Until(deadline)))
	defer end.Stop()
	for {
		resp, err := client.Get("http://atoll/api/atoll/v1/site")
		if err == nil {
			resp.Body.Close()
			if resp.StatusCode == http.StatusOK {
				return
			}
			err = errors.New(resp.Status)
		}
		select {
		case <-end.C:
			ts.Fatalf("no node serves with %s: %v", dir, err)
		case <-tick.C:
		}
	}
}

func wrote(ts *testscript.TestScript, name string, deadline time.Time) {
	tick := time.NewTicker(20 * time.Millisecond)
	defer tick.Stop()
	end := time.NewTimer(min(time.Minute, time.Until(deadline)))
	defer end.Stop()
	for {
		if _, err := os.Stat(ts.MkAbs(name)); err == nil {
			return
		}
		select {
		case <-end.C:
			ts.Fatalf("nobody wrote %s", name)
		case <-tick.C:
		}
	}
}

func awaits(ts *testscript.TestScript, dir, pattern string, deadline time.Time) {
	want, err := regexp.Compile("(?m)" + pattern)
	ts.Check(err)
	tick := time.NewTicker(100 * time.Millisecond)
	defer tick.Stop()
	end := time.NewTimer(min(time.Minute, time.Until(deadline)))
	defer end.Stop()
	for {
		ts.Check(ts.Exec("atoll", "cluster", "status", "--data", dir))
		said := ts.ReadFile("stdout")
		if want.MatchString(said) {
			return
		}
		select {
		case <-end.C:
			ts.Fatalf("the status never says %s, but:\n%s", pattern, said)
		case <-tick.C:
		}
	}
}

// repository opens a reference on a node with plain HTTP, as the admin whose
// password is in $PASSWORD.
func repository(ts *testscript.TestScript, reference string) *remote.Repository {
	repo, err := remote.NewRepository(reference)
	ts.Check(err)
	repo.PlainHTTP = true
	repo.Client = &auth.Client{Credential: auth.StaticCredential(repo.Reference.Registry, auth.Credential{Username: "admin", Password: ts.Getenv("PASSWORD")})}
	return repo
}

// patience bounds one talk with a node.
func patience() (context.Context, context.CancelFunc) {
	return context.WithTimeout(context.Background(), 30*time.Second)
}

func push(ts *testscript.TestScript, _ bool, args []string) {
	repo := repository(ts, args[0])
	ctx, cancel := patience()
	defer cancel()
	packed, err := oras.PackManifest(ctx, repo, oras.PackManifestVersion1_1, "application/vnd.example.note", oras.PackManifestOptions{
		ManifestAnnotations: map[string]string{"org.opencontainers.image.created": "2026-01-02T03:04:05Z"},
	})
	ts.Check(err)
	ts.Check(repo.Tag(ctx, packed, repo.Reference.Reference))
}

func pull(ts *testscript.TestScript, neg bool, args []string) {
	repo := repository(ts, args[0])
	ctx, cancel := patience()
	defer cancel()
	found, _, err := oras.FetchBytes(ctx, repo, repo.Reference.Reference, oras.DefaultFetchBytesOptions)
	if neg {
		if err == nil {
			ts.Fatalf("%s can be pulled", args[0])
		}
		return
	}
	ts.Check(err)
	ts.Setenv(args[1], found.Digest.String())
}

func field(ts *testscript.TestScript, _ bool, args []string) {
	var document map[string]any
	ts.Check(json.Unmarshal([]byte(ts.ReadFile(args[1])), &document))
	value, ok := document[args[2]]
	if !ok {
		ts.Fatalf("%s has no %s", args[1], args[2])
	}
	ts.Setenv(args[0], fmt.Sprint(value))
}

func trusting(ts *testscript.TestScript, file string) *tls.Config {
	pool := x509.NewCertPool()
	if !pool.AppendCertsFromPEM([]byte(ts.ReadFile(file))) {
		ts.Fatalf("%s holds no certificate", file)
	}
	return &tls.Config{RootCAs: pool}
}

func names(ts *testscript.TestScript, _ bool, args []string) {
	for _, name := range args[2:] {
		config := trusting(ts, args[1])
		config.ServerName = name
		conn, err := tls.Dial("tcp", args[0], config)
		ts.Check(err)
		conn.Close()
	}
}

func selfsigned(ts *testscript.TestScript, _ bool, args []string) {
	public, private, err := ed25519.GenerateKey(nil)
	ts.Check(err)
	template := &x509.Certificate{
		SerialNumber: big.NewInt(1), DNSNames: args[2:],
		NotBefore: time.Now().Add(-time.Hour), NotAfter: time.Now().Add(time.Hour),
	}
	cert, err := x509.CreateCertificate(nil, template, template, public, private)
	ts.Check(err)
	key, err := x509.MarshalPKCS8PrivateKey(private)
	ts.Check(err)
	ts.Check(os.WriteFile(ts.MkAbs(args[0]), pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: cert}), 0o644))
	ts.Check(os.WriteFile(ts.MkAbs(args[1]), pem.EncodeToMemory(&pem.Block{Type: "PRIVATE KEY", Bytes: key}), 0o600))
}

func challenge(ts *testscript.TestScript, _ bool, args []string) {
	client := &http.Client{Transport: &http.Transport{TLSClientConfig: trusting(ts, args[1]), DisableKeepAlives: true}}
	ctx, cancel := patience()
	defer cancel()
	r, err := http.NewRequestWithContext(ctx, http.MethodGet, args[0]+"/v2/", nil)
	ts.Check(err)
	if len(args) > 2 {
		r.Host = args[2]
	}
	resp, err := client.Do(r)
	ts.Check(err)
	resp.Body.Close()
	_, err = fmt.Fprintln(ts.Stdout(), resp.Header.Get("WWW-Authenticate"))
	ts.Check(err)
}

func damage(ts *testscript.TestScript, _ bool, args []string) {
	name := ts.MkAbs(args[1])
	data, err := os.ReadFile(name)
	ts.Check(err)
	switch args[0] {
	case "cut":
		data = data[:len(data)*2/3]
	case "flip":
		data[len(data)/2] ^= 1
	case "newer":
		data, err = newer(data)
		ts.Check(err)
	default:
		ts.Fatalf("damage cut|flip|newer FILE")
	}
	ts.Check(os.WriteFile(name, data, 0o644))
}

// newer makes a bundle say that its format is version 2.
func newer(data []byte) ([]byte, error) {
	const key = `"payload":"`
	start := bytes.Index(data, []byte(key)) + len(key)
	n := bytes.IndexByte(data[start:], '"')
	payload, err := base64.StdEncoding.DecodeString(string(data[start : start+n]))
	if err != nil {
		return nil, err
	}
	changed := bytes.ReplaceAll(payload, []byte(`"format":1`), []byte(`"format":2`))
	if bytes.Equal(changed, payload) {
		return nil, errors.New("the statement names no format")
	}
	copy(data[start:], base64.StdEncoding.EncodeToString(changed))
	return data, nil
}
