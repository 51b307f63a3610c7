package main

import (
	"crypto/sha256"
	"encoding/hex"
	"fmt"
	"io"
	"net/http"
	"os"
	"path/filepath"
)

// floor serves the least that a registry must do, with nothing else: PUT hashes,
// writes, fsyncs and renames a blob; GET hands the file to the kernel. No server
// in Go that keeps the same promises can cost less.
func floor(dir, addr string, pair certificate) error {
	mux := http.NewServeMux()
	mux.HandleFunc("PUT /{name}", func(w http.ResponseWriter, r *http.Request) {
		if err := keep(dir, r.PathValue("name"), r.Body); err != nil {
			http.Error(w, err.Error(), http.StatusInternalServerError)
			return
		}
		w.WriteHeader(http.StatusCreated)
	})
	mux.HandleFunc("GET /{name}", func(w http.ResponseWriter, r *http.Request) {
		file, err := os.Open(filepath.Join(dir, filepath.Base(r.PathValue("name"))))
		if err != nil {
			http.Error(w, err.Error(), http.StatusNotFound)
			return
		}
		defer file.Close()
		info, err := file.Stat()
		if err != nil {
			http.Error(w, err.Error(), http.StatusInternalServerError)
			return
		}
		w.Header().Set("Content-Type", "application/octet-stream")
		http.ServeContent(w, r, "", info.ModTime(), file)
	})
	if pair.cert != "" {
		return http.ListenAndServeTLS(addr, pair.cert, pair.key, mux)
	}
	return http.ListenAndServe(addr, mux)
}

func keep(dir, name string, body io.Reader) error {
	temp, err := os.CreateTemp(dir, "up")
	if err != nil {
		return err
	}
	defer os.Remove(temp.Name()) // does nothing once renamed
	defer temp.Close()
	hash := sha256.New()
	if _, err := io.CopyBuffer(io.MultiWriter(temp, hash), body, make([]byte, 1<<20)); err != nil {
		return err
	}
	if got := hex.EncodeToString(hash.Sum(nil)); got != name && len(name) == 64 {
		return fmt.Errorf("digest is %s, not %s", got, name)
	}
	if err := temp.Sync(); err != nil {
		return err
	}
	if err := os.Rename(temp.Name(), filepath.Join(dir, filepath.Base(name))); err != nil {
		return err
	}
	d, err := os.Open(dir)
	if err != nil {
		return err
	}
	defer d.Close()
	return d.Sync()
}
