package sim

// scenes are cases in which much happens in few steps: several takes, copies
// that one snapshot has from another, storage that goes on in a second file,
// image writes of whole chunks and parts, ends under I/O, and takes of two disks
// that a death may leave half done, with an increment over them.
var scenes = []string{`
config Devices=1 Size0=61 Size1=8 Size2=8 Queues=2 IQueues=2 Depth=4 MaxIO=64 Block=12 Slots=2 Storages=2 Limit=56 Portion=8 Encrypt=2 Sector=1
order 1
create snap=0 off=0 len=2 arg=1
create snap=1 off=1 len=1 arg=1
append snap=0
append snap=1
take snap=0
write off=0 len=20 gap=255
take snap=1 gap=2
write queue=1 off=3 len=30 fua=1 gap=255
iwrite snap=0 off=40 len=16
iwrite snap=1 off=50 len=3
iread snap=0 off=0 len=61 gap=3
zeroes off=33 len=28
izeroes snap=1 queue=1 off=0 len=20
flush
mark off=7 len=9
write off=24 len=8
destroy snap=0 gap=4
write off=8 len=8
iread snap=1 off=0 len=61 gap=5
create snap=0 off=1 len=1 arg=1 gap=255
append snap=0
take snap=0
write off=0 len=61 gap=255
iread snap=0 off=20 len=41 gap=2
iread snap=1 off=20 len=41
`, `
config Devices=2 Size0=61 Size1=40 Size2=8 Queues=2 IQueues=1 Depth=4 MaxIO=64 Block=9 Discards=2 Slots=3 Storages=2 Limit=72 Portion=8 Sector=1 Fixed=2 Earlier=254
order 3
create snap=0 off=1 len=1 arg=1
add snap=0 dev=1
append snap=0
take snap=0
write off=0 len=17 gap=255
write dev=1 off=5 len=30
create snap=1 off=0 len=1 arg=2
discard off=0 len=61
iwrite snap=0 dev=1 off=8 len=32
take snap=1 gap=3
write dev=1 queue=1 off=0 len=40 fua=1 gap=255
iread snap=1 off=0 len=40
iwrite snap=1 off=1 len=2
zeroes off=20 len=41
create snap=2 off=2 len=2 arg=3
take snap=2
cancel
take snap=2 gap=255
write off=1 len=60 gap=255
destroy snap=1
iread snap=2 off=0 len=61
iread snap=0 off=0 len=61
mark dev=1 off=39 len=1
destroy snap=2 gap=6
write dev=1 off=0 len=9
`, `
config Devices=1 Size0=96 Size1=8 Size2=8 Queues=1 IQueues=1 Depth=8 MaxIO=96 Block=13 Discards=1 Slots=2 Storages=2 Limit=64 Portion=16 Encrypt=3 Sector=8
order 1
create snap=0 off=0 len=4 arg=1
append snap=0 arg=1
take snap=0
write off=0 len=96 gap=255
iread snap=0 off=0 len=96
iwrite snap=0 off=0 len=8
iwrite snap=0 off=8 len=88 gap=5
write off=16 len=16
create snap=1 off=3 len=1 arg=1
take snap=1
zeroes off=0 len=64 gap=255
iread snap=1 off=0 len=96
destroy snap=0
flush
iread snap=1 off=8 len=64
destroy snap=1
replace arg=8 gap=255
write off=90 len=14
create snap=1 off=1 len=1 arg=1
take snap=1
write off=0 len=64 gap=255
iread snap=1 off=8 len=64
`, `
config Devices=1 Size0=256 Size1=8 Size2=8 Queues=1 IQueues=1 Depth=1 MaxIO=64 Block=13 Slots=3 Storages=1 Limit=1024 Portion=64 Sector=1 Earlier=253
order 7
create snap=0 len=8 arg=1
create snap=1 off=1 len=8 arg=1
create snap=2 len=3 arg=1
take snap=0
zeroes off=8 len=113 gap=255
take snap=1
write off=112 len=50 gap=255
write off=240 len=1 gap=4
take snap=2
write off=1 len=1 gap=255
write off=200 len=30 gap=2
iwrite snap=0 off=170 len=9 gap=2
write off=180 len=1 gap=7
`, `
config Devices=2 Size0=16 Size1=24 Size2=8 Queues=1 IQueues=1 Depth=2 MaxIO=16 Block=9 Slots=3 Storages=1 Limit=64 Portion=16 Sector=1
order 9
create snap=0 len=1 arg=3
take snap=0 gap=255
write off=8 len=8
write dev=1 off=3 len=9 gap=255
create snap=1 len=1 arg=3
take snap=1 gap=255
write len=1 gap=40
create snap=2 len=1 arg=3
take snap=2 gap=255
write len=16 gap=255
`}

// recordScenes are scenes in which the steps of the records come one by one: filters that
// come and go, snapshots in every stage with storage of every kind, takes of two disks, and a
// snapshot that breaks.
// They are short, because a process dies at each step of them.
var recordScenes = []string{`
config Devices=1 Size0=16 Size1=8 Size2=8 Queues=1 IQueues=1 Depth=1 MaxIO=16 Block=9 Slots=1 Storages=1 Limit=64 Portion=16 Sector=1 Zone=12 Records=1
order 15
write off=0 len=4
replace gap=255
write off=4 len=4 gap=255
replace arg=8 gap=255
write off=17 len=2 gap=255
`, `
config Devices=1 Size0=16 Size1=8 Size2=8 Queues=1 IQueues=1 Depth=1 MaxIO=16 Block=12 Slots=3 Storages=2 Limit=64 Portion=16 Sector=1 Fixed=2 Encrypt=2 Records=1
order 17
create snap=2 len=1 arg=1 queue=2
create snap=0 len=1 arg=1
take snap=0 gap=255
write off=0 len=8
append snap=0 gap=255
create snap=1 len=1 arg=1 fua=1
write off=8 len=8 gap=255
destroy snap=0
destroy snap=2 gap=255
`, `
config Devices=2 Size0=16 Size1=16 Size2=8 Queues=1 IQueues=1 Depth=1 MaxIO=16 Block=9 Slots=3 Storages=1 Limit=64 Portion=16 Sector=1 Records=1
order 19
create snap=0 len=1 arg=3 fua=1
write len=4 gap=255
write dev=1 off=8 len=1 gap=255
create snap=1 len=1 arg=3
take snap=1 gap=255
write off=8 len=1 gap=255
create snap=2 len=1 arg=3
take snap=2 gap=255
`, `
config Devices=1 Size0=32 Size1=8 Size2=8 Queues=1 IQueues=1 Depth=1 MaxIO=16 Block=12 Slots=1 Storages=1 Limit=8 Portion=8 Encrypt=1 Sector=1 Records=1
order 21
create snap=0 len=1 arg=1 fua=1
write off=0 len=8 gap=255
write off=8 len=8 gap=255
write off=16 len=8 gap=255
iread snap=0 off=0 len=8 gap=255
`}

// logScenes are scenes with write-intent logs: the numbers run out, and the filter goes and
// comes back.
var logScenes = []string{`
config Devices=1 Size0=64 Size1=8 Size2=8 Queues=1 IQueues=1 Depth=2 MaxIO=16 Block=12 Slots=3 Storages=1 Limit=64 Portion=16 Sector=1 Earlier=253 Zone=12
order 11
create snap=0 len=2 arg=1
create snap=1 len=2 arg=1
write off=0 len=8
take snap=0 gap=255
iwrite snap=0 off=40 len=8 gap=255
take snap=1 gap=255
write off=0 len=3
write off=20 len=3
mark off=60 len=1
checkpoint gap=5
create snap=2 len=2 arg=1
take snap=2 gap=255
write off=8 len=9 gap=255
`, `
config Devices=1 Size0=64 Size1=8 Size2=8 Queues=2 IQueues=1 Depth=2 MaxIO=16 Block=9 Slots=2 Storages=1 Limit=64 Portion=16 Sector=1 Zone=12
order 13
write off=0 len=8
checkpoint gap=4
write off=0 len=8
replace gap=255
write off=4 len=8
write queue=1 off=30 len=3 gap=255
create snap=0 len=2 arg=1
take snap=0 gap=255
write off=4 len=8
destroy snap=0 gap=255
replace gap=255
discard off=16 len=48 gap=3
replace arg=8 gap=255
write off=66 len=2 gap=255
`}
