module github.com/kvahead/kvahead/bindings/go

go 1.19
