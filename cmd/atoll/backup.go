package main

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net/url"
	"os"
	"path/filepath"
	"strings"
	"text/tabwriter"

	"filippo.io/age"
	"github.com/spf13/cobra"

	"github.com/atoll-registry/atoll/cluster/epoch"
	"github.com/atoll-registry/atoll/node"
	"github.com/atoll-registry/atoll/node/backup"
	"github.com/atoll-registry/atoll/node/fault"
)

func newBackup() *cobra.Command {
	var asked backup.Request
	var output string
	cmd := &cobra.Command{
		Use:   "backup -o FILE [--blobs] [--recipient AGE-KEY]",
		Short: "Write a backup of the site while it works",
		Long: `Write a backup of the site while it works: all metadata as it is at one moment,
with --blobs also the content of all projects, fetched from other nodes where this
one lacks it.

With --recipient the backup is encrypted, and holds the key that opens the site's
secrets. Make a pair with age-keygen, keep the identity away from the site, and
give its public key (age1...) here. Without --recipient the backup is readable to
whoever has the file and holds no keys: restoring it takes the file cluster.key
of a node as well.

The file appears under its name only when it is whole; it was verified then, and
the site remembers it as its last backup (atoll cluster status).`,
		Args: exactArgs(),
		RunE: func(cmd *cobra.Command, _ []string) error {
			if output == "" {
				return usageError{errors.New("name the file to write with -o FILE, or - for standard output")}
			}
			c, err := newClient(cmd)
			if err != nil {
				return err
			}
			body, err := json.Marshal(asked)
			if err != nil {
				return err
			}
			answer, err := c.stream(cmd.Context(), "POST", "/api/atoll/v1/backup", &payload{bytes.NewReader(body), "application/json", int64(len(body))})
			if err != nil {
				return err
			}
			defer answer.Body.Close()
			bar := newProgress(cmd, -1, "backing up")
			checked, err := saveBackup(cmd, output, io.TeeReader(answer.Body, bar))
			bar.Finish()
			if err != nil {
				return err
			}
			// The site remembers it as its last backup, now that it is safe.
			if err := c.call(cmd.Context(), "PUT", "/api/atoll/v1/backup/"+url.PathEscape(checked.ID), nil, nil); err != nil {
				fmt.Fprintf(cmd.ErrOrStderr(), "the backup is whole, but the site does not remember it as its last: %v\n", err)
			}
			shown := cmd
			if output == "-" {
				shown = &cobra.Command{} // standard output is the backup
				shown.SetOut(io.Discard)
			}
			if err := show(shown, checked, func(w *tabwriter.Writer) { printBackup(w, checked) }); err != nil {
				return err
			}
			if len(asked.Recipients) == 0 {
				fmt.Fprintln(cmd.ErrOrStderr(), "no --recipient: the backup is not encrypted and holds no keys; keep the file cluster.key of a node's data directory in another place")
			}
			if checked.Missing > 0 {
				return fault.New(fault.Precondition, "the backup is written, but %d blobs are not in it: no node that is up holds them whole", checked.Missing)
			}
			return nil
		},
	}
	clientFlags(cmd)
	formatFlag(cmd)
	cmd.Flags().StringVarP(&output, "output", "o", "", "file to write; - for standard output")
	cmd.Flags().BoolVar(&asked.Blobs, "blobs", false, "with the content of all projects, not their metadata alone")
	cmd.Flags().StringSliceVar(&asked.Recipients, "recipient", nil, "public keys (age1...) of those who may open the backup")
	cmd.AddCommand(newBackupVerify())
	return cmd
}

// saveBackup writes a backup and verifies it on the way.
func saveBackup(cmd *cobra.Command, output string, from io.Reader) (backup.Verified, error) {
	// The stream is copied by the reader that verifies it.
	if output == "-" {
		return backup.Verify(io.TeeReader(from, cmd.OutOrStdout()), nil)
	}
	temp, err := os.CreateTemp(filepath.Dir(output), "."+filepath.Base(output)+".*") // 0600: it has secrets in it
	if err != nil {
		return backup.Verified{}, err
	}
	defer os.Remove(temp.Name()) // does nothing once renamed
	checked, err := backup.Verify(io.TeeReader(from, temp), nil)
	err = errors.Join(err, temp.Sync(), temp.Close())
	if err != nil {
		return checked, fmt.Errorf("writing %s: %w; nothing was kept", output, err)
	}
	return checked, os.Rename(temp.Name(), output)
}

func newBackupVerify() *cobra.Command {
	var identity string
	cmd := &cobra.Command{
		Use:   "verify FILE",
		Short: "Prove that a backup is whole (- for standard input); with --identity also what is inside",
		Args:  exactArgs("FILE"),
		RunE: func(cmd *cobra.Command, args []string) error {
			identities, err := readIdentities(identity)
			if err != nil {
				return err
			}
			file, length, err := openBundle(cmd, args[0])
			if err != nil {
				return err
			}
			defer file.Close()
			bar := newProgress(cmd, length, "verifying")
			checked, err := backup.Verify(io.TeeReader(file, bar), identities)
			bar.Finish()
			if err != nil {
				return fmt.Errorf("%s: %w", args[0], err)
			}
			return show(cmd, checked, func(w *tabwriter.Writer) { printBackup(w, checked) })
		},
	}
	formatFlag(cmd)
	cmd.Flags().StringVar(&identity, "identity", "", "file with the identity (AGE-SECRET-KEY-...) of a recipient")
	return cmd
}

func readIdentities(name string) ([]age.Identity, error) {
	if name == "" {
		return nil, nil
	}
	file, err := os.Open(name)
	if err != nil {
		return nil, usageError{err}
	}
	defer file.Close()
	identities, err := age.ParseIdentities(file)
	if err != nil {
		return nil, usageError{fmt.Errorf("%s holds no identity of age (AGE-SECRET-KEY-...): %w", name, err)}
	}
	return identities, nil
}

func printBackup(w *tabwriter.Writer, v backup.Verified) {
	row(w, "backup", v.ID)
	row(w, "of site", v.Site)
	row(w, "written", v.Created.Format("2006-01-02 15:04 UTC")+" on "+v.Node)
	row(w, "metadata", fmt.Sprintf("revision %d", v.Revision))
	if e, err := epoch.Parse(v.Epoch); err == nil && !e.Zero() {
		row(w, "recovery epoch", e)
	}
	keys := "none: it is not encrypted"
	if v.Encrypted {
		keys = "encrypted"
	}
	row(w, "keys", keys)
	if v.Header.Blobs {
		row(w, "blobs", fmt.Sprintf("%d (%s)", v.Summary.Blobs, size(v.Bytes)))
	} else {
		row(w, "blobs", "none: metadata only")
	}
	if v.Missing > 0 {
		row(w, "missing", fmt.Sprintf("%d blobs, among them %s", v.Missing, strings.Join(v.Examples, " ")))
	}
	if v.Encrypted && !v.Opened {
		row(w, "verified", "the hash over the whole file; to look inside as well, name an identity with --identity")
	} else {
		row(w, "verified", "the hash over the whole file, and every part")
	}
}

func newRestore() *cobra.Command {
	var keys func() (node.Keys, error)
	var data, identity, clusterKey, logLevel string
	r := backup.Restoring{}
	cmd := &cobra.Command{
		Use:   "restore FILE --data DIR [--identity KEYFILE]",
		Short: "Make a site of one node out of a backup, in an empty data directory",
		Long: `Make a site of one node out of a backup, in an empty data directory. The backup
is verified as a whole first. The node is then started with: atoll serve --data DIR.

The restored site is the same site in a new life: its journals go on under a new
incarnation, and nodes of the old one that come back are refused. Other nodes join
it anew with tokens. If the command is cut short, run it again with the same file.

Nodes of the old site that the restored one can reach would be put out of service
when it starts, so it is refused while one answers. Try a backup out on a machine
that cannot reach them; --replace restores although they answer.`,
		Args: exactArgs("FILE"),
		RunE: func(cmd *cobra.Command, args []string) (err error) {
			if r.Log, err = newLogger(cmd, logLevel); err != nil {
				return err
			}
			if r.Identities, err = readIdentities(identity); err != nil {
				return err
			}
			opens, err := keys()
			if err != nil {
				return err
			}
			if clusterKey != "" {
				if r.ClusterKey, err = os.ReadFile(clusterKey); err != nil {
					return usageError{err}
				}
			}
			file, err := os.Open(args[0])
			if err != nil {
				return usageError{err}
			}
			defer file.Close()
			info, err := file.Stat()
			if err != nil {
				return err
			}
			bar := newProgress(cmd, 2*info.Size(), "restoring")
			r.Data, r.File, r.Progress = dataDir(data), file, func(n int) { _ = bar.Add(n) } // a bar that cannot be drawn is no failure
			out, err := node.Restore(cmd.Context(), r, opens)
			bar.Finish()
			if err != nil {
				return fmt.Errorf("restoring %s: %w", args[0], err)
			}
			return show(cmd, out, func(w *tabwriter.Writer) {
				row(w, "site", out.Site)
				row(w, "as of", out.Backup.Created.Format("2006-01-02 15:04 UTC"))
				row(w, "recovery epoch", out.Epoch)
				row(w, "node", out.Node)
				w.Flush()
				if !out.Backup.Blobs {
					fmt.Fprintln(w, "the backup held no blobs: what this directory does not hold already has to be pushed again, or comes with nodes that join")
				}
				fmt.Fprintf(w, "\nstart it:        atoll serve --data %s\nadd other nodes: atoll token create, then atoll serve --join there, in wiped directories\n", r.Data)
			})
		},
	}
	f := cmd.Flags()
	f.StringVar(&data, "data", "", "data directory to make (default "+node.DefaultDataDir()+")")
	f.StringVar(&identity, "identity", "", "file with the identity (AGE-SECRET-KEY-...) of a recipient")
	f.BoolVar(&r.Replace, "replace", false, "restore although nodes of the old site answer; they are put out of service when this one starts")
	f.StringVar(&clusterKey, "cluster-key", "", "file cluster.key of a node of the site, for a backup without keys")
	f.StringVar(&r.Name, "name", "", "name of the node for people (default: that of the node which wrote the backup)")
	f.StringVar(&r.Addr, "advertise", "", "address of its peer port (default: that node's; it is corrected when the node starts)")
	keys = keyFlags(cmd, true)
	f.StringVar(&logLevel, "log-level", "warn", "what to log: debug, info, warn or error")
	formatFlag(cmd)
	return cmd
}

func dataDir(flag string) string {
	if flag == "" {
		return node.DefaultDataDir()
	}
	return flag
}
