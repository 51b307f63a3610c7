package main

import (
	"bytes"
	"errors"
	"net"
	"os"
	"os/exec"
	"testing"
)

// TestInterrupt: Ctrl-C ends a command that waits for a node, with the exit code
// that shells expect and one line that says so.
func TestInterrupt(t *testing.T) {
	silent, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer silent.Close()
	cmd := exec.CommandContext(t.Context(), "atoll", "cluster", "status", "--server", "http://"+silent.Addr().String())
	cmd.Env = append(os.Environ(), "HOME="+t.TempDir(), "ATOLL_USERNAME=admin", "ATOLL_PASSWORD=not-a-secret-12")
	var errs bytes.Buffer
	cmd.Stderr = &errs
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	conn, err := silent.Accept() // it has asked, and gets no answer
	if err != nil {
		t.Fatal(err)
	}
	defer conn.Close()
	if err := cmd.Process.Signal(os.Interrupt); err != nil {
		t.Fatal(err)
	}
	var exit *exec.ExitError
	if err := cmd.Wait(); !errors.As(err, &exit) || exit.ExitCode() != exitInterrupted {
		t.Errorf("an interrupted command ended with %v, want exit code %d", err, exitInterrupted)
	}
	if got, want := errs.String(), "atoll: interrupted\n"; got != want {
		t.Errorf("it said %q, want %q", got, want)
	}
}
