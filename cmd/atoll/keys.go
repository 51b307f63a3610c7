package main

import (
	"bytes"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"strings"
	"text/tabwriter"

	"github.com/spf13/cobra"

	"github.com/atoll-registry/atoll/cluster/keyring"
	"github.com/atoll-registry/atoll/node"
)

// credentialName is that of the passphrase among the credentials of a systemd unit.
const credentialName = "atoll-key-passphrase"

// keyFlags adds the flags that say what opens a node's keys, and gives what reads
// them. choose: the node may be a new one, for which a provider is chosen.
func keyFlags(cmd *cobra.Command, choose bool) func() (node.Keys, error) {
	var k node.Keys
	var file string
	if choose {
		cmd.Flags().StringVar(&k.Provider, "key-provider", "", "how the keys of a new node are kept: file (plain, 0600) or passphrase (sealed; default: file; a node that is there already stays as it is)")
	}
	cmd.Flags().StringVar(&file, "key-passphrase-file", "", "file with the passphrase that opens the node's keys (default: the systemd credential "+credentialName+")")
	return func() (node.Keys, error) {
		var err error
		k.Named = file != ""
		if k.Named {
			k.Passphrase, err = passphraseFile(file)
		} else {
			k.Passphrase, err = credential()
		}
		return k, err
	}
}

func passphraseFile(name string) ([]byte, error) {
	data, err := os.ReadFile(name)
	if err != nil {
		return nil, usageError{err}
	}
	data = bytes.TrimRight(data, "\r\n")
	if len(data) == 0 {
		return nil, usageError{fmt.Errorf("%s is empty: it has to hold the passphrase", name)}
	}
	return data, nil
}

// credential is the passphrase that systemd hands over; none is fine.
func credential() ([]byte, error) {
	dir := os.Getenv("CREDENTIALS_DIRECTORY")
	if dir == "" {
		return nil, nil
	}
	name := filepath.Join(dir, credentialName)
	if _, err := os.Stat(name); errors.Is(err, fs.ErrNotExist) {
		return nil, nil
	}
	return passphraseFile(name)
}

func newNodeRekey() *cobra.Command {
	var data, file, oldFile string
	var from, to node.Keys
	cmd := &cobra.Command{
		Use:   "rekey --data DIR --key-provider passphrase --key-passphrase-file FILE",
		Short: "Seal the keys of a stopped node with a passphrase, with another one, or not any more",
		Long: `Seal the keys of a stopped node with a passphrase, with another one
(--old-key-passphrase-file names the present one), or not any more (--key-provider file).

Sealed are the node's identity with its private key, the cluster key, the key of the
registry's address and the passwords of an object store. From then on each start needs
the passphrase: by --key-passphrase-file, ATOLL_KEY_PASSPHRASE_FILE, or as the systemd
credential ` + credentialName + `. Without it the node cannot be opened by anybody: keep it
in another place, too. If the command is cut short, run it again, or start the node with
the new passphrase.`,
		Args: exactArgs(),
		RunE: func(cmd *cobra.Command, _ []string) (err error) {
			switch to.Provider {
			case "":
				return usageError{errors.New("say how the keys are to be kept: --key-provider passphrase or --key-provider file")}
			case keyring.PassphraseName:
				if file == "" {
					return usageError{errors.New("name the file with the new passphrase: --key-passphrase-file FILE")}
				}
				if to.Passphrase, err = passphraseFile(file); err != nil {
					return err
				}
			}
			if oldFile == "" && to.Provider == keyring.File {
				oldFile = file // the one that the node is started with
			}
			if oldFile != "" {
				from.Passphrase, err = passphraseFile(oldFile)
			} else {
				from.Passphrase, err = credential()
			}
			if err != nil {
				return err
			}
			out, err := node.Rekey(cmd.Context(), dataDir(data), from, to)
			if err != nil {
				return err
			}
			return show(cmd, out, func(w *tabwriter.Writer) { printRekeyed(w, out) })
		},
	}
	f := cmd.Flags()
	f.StringVar(&data, "data", "", "data directory of the stopped node (default "+node.DefaultDataDir()+")")
	f.StringVar(&to.Provider, "key-provider", "", "how the keys are to be kept: file (plain, 0600) or passphrase (sealed)")
	f.StringVar(&file, "key-passphrase-file", "", "file with the new passphrase")
	f.StringVar(&oldFile, "old-key-passphrase-file", "", "file with the passphrase that the keys are sealed with now (default: the systemd credential "+credentialName+")")
	formatFlag(cmd)
	return cmd
}

func printRekeyed(w *tabwriter.Writer, out node.Rekeyed) {
	row(w, "keys in", out.Data)
	row(w, "kept by", out.Provider)
	w.Flush()
	if len(out.Left) > 0 {
		fmt.Fprintf(w, "not touched, with keys of before: %s; delete them when they are not needed any more\n", strings.Join(out.Left, ", "))
	}
	if out.Provider == keyring.PassphraseName {
		fmt.Fprintf(w, "\nstart it: atoll serve --data %s --key-passphrase-file FILE\n", out.Data)
	}
}
