KERNEL ?= 6.12

.PHONY: vm
vm: bin/vm
	@./bin/vm -kernel $(KERNEL) "$$CMD"

.PHONY: bin/vm
bin/vm:
	@go build -o $@ ./tests/vm
override CMD := $(value CMD)
export CMD
