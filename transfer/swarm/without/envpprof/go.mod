// The module path is that of the one it stands in for; go.mod of Atoll replaces it.
module github.com/anacrolix/envpprof

go 1.26.0
