# A guest that touches all of its memory at random, again and again, and counts how long each touch took.
#
# Built flat to run at 0xF0000; a VMM maps the end of the firmware there, and the reset vector jumps to its first byte.
#
#   as --64 -o toucher.o toucher.S && ld -m elf_x86_64 -Ttext=0xF0000 --oformat binary -o toucher.bin toucher.o
#
# Real mode -> protected mode (page tables) -> long mode -> CPL3, where it stays: port I/O is allowed by the TSS.
#
#   x = x * A + C mod 2^k      every page once, then again; those beyond the last one are skipped
#   page = x ^ (x >> shift)    neighbours are not touched one after the other
#
# One touch adds 1 to the first word of a page; the time stamp counter is read before and behind it.
#
# At 0x1000 (STATUS), u64: touches, letters printed, the last time stamp, x.
# At 0x2000 (HISTOGRAM), 512 u64: touches by cycles; 16 buckets an octave, the first octave is 0 to 2047 cycles.
# On the serial port: A cold start, then B once per period.

        .set    STATUS, 0x1000
        .set    HISTOGRAM, 0x2000
        .set    GDT, 0x3000
        .set    TSS, 0x3400
        .set    PML4, 0x10000
        .set    PDPT, 0x11000
        .set    PD, 0x12000                     # four of them
        .set    FIRST_OCTAVE, 10
        .set    BUCKET_BITS, 4

        .code16
        .globl  _start
_start: jmp     real

        .balign 8
base:   .quad   0x1000000                       # +0x08: guest-physical address of the first page; patched into the image …
pages:  .quad   1024                            # +0x10 … how many
mask:   .quad   1023                            # +0x18 … 2^k - 1
shift:  .quad   5                               # +0x20
period: .quad   2000000                         # +0x28: cycles between two letters

real:   cli
        lgdtl   %cs:(romgdt_ptr - _start)
        movl    %cr0, %eax
        andl    $0x9fffffff, %eax               # clear CD and NW
        orl     $0x23, %eax                     # PE, MP, NE
        movl    %eax, %cr0
        ljmpl   $0x08, $protected

        .balign 8
romgdt: .quad   0
        .quad   0x00cf9b000000ffff              # 08 code32
        .quad   0x00cf93000000ffff              # 10 data
        .quad   0x00af9b000000ffff              # 18 code64
        .quad   0x00cff3000000ffff              # 20 user data   (selector 23)
        .quad   0x00affb000000ffff              # 28 user code64 (selector 2b)
        .quad   0x0000890034000000 + 232        # 30 TSS at 0x3400, with the I/O bitmap
        .quad   0
romgdt_end:
romgdt_ptr:
        .word   romgdt_end - romgdt - 1
        .long   romgdt
gdt_ptr:
        .word   romgdt_end - romgdt - 1
        .long   GDT, 0

        .code32
protected:
        movw    $0x10, %ax
        movw    %ax, %ds
        movw    %ax, %es
        movw    %ax, %ss
        movl    $0x8000, %esp
        cld
        movl    $STATUS, %edi                   # clear all tables
        xorl    %eax, %eax
        movl    $(0x7000 / 4), %ecx
        rep stosl
        movl    $PML4, %edi
        movl    $(0x6000 / 4), %ecx
        rep stosl
        movl    $(PDPT + 7), PML4
        movl    $PDPT, %edi
        movl    $(PD + 7), %eax
        movl    $4, %ecx
1:      movl    %eax, (%edi)
        addl    $0x1000, %eax
        addl    $8, %edi
        loop    1b
        movl    $PD, %edi                       # 4 GiB one to one, in pages of 2 MiB
        movl    $0xe7, %eax                     # P RW US A D PS
        movl    $2048, %ecx
1:      movl    %eax, (%edi)
        addl    $0x200000, %eax
        addl    $8, %edi
        loop    1b
        movl    $romgdt, %esi
        movl    $GDT, %edi
        movl    $((romgdt_end - romgdt) / 4), %ecx
        rep movsl
        movl    $0x00680000, TSS + 100          # I/O bitmap at 104, all bits clear
        movb    $0xff, TSS + 232
        movl    $0x20, %eax                     # PAE
        movl    %eax, %cr4
        movl    $PML4, %eax
        movl    %eax, %cr3
        movl    $0xc0000080, %ecx               # EFER: SCE, LME
        rdmsr
        orl     $0x101, %eax
        wrmsr
        movl    %cr0, %eax
        orl     $0x80010000, %eax               # PG, WP
        movl    %eax, %cr0
        lgdtl   gdt_ptr
        ljmpl   $0x18, $long

        .code64
long:   movl    $0x30, %eax
        ltr     %ax
        movl    $0xc0000081, %ecx               # STAR, for the sysret
        movl    $0x001b0018, %edx
        xorl    %eax, %eax
        wrmsr
        movl    $user, %ecx
        movl    $2, %r11d
        sysretq

user:   movw    $0x3f8, %dx
        movb    $'A', %al
        outb    %al, %dx
        movq    base, %r12
        movq    pages, %r10
        movq    mask, %r9
        movq    period, %rbp
        xorl    %r8d, %r8d
        xorl    %r13d, %r13d                    # when the last letter was printed
        movabsq $6364136223846793005, %r11
        movl    $HISTOGRAM, %r15d
        movl    $STATUS, %r14d

next:   imulq   %r11, %r8
        addq    $1442695041, %r8
        andq    %r9, %r8
        movq    %r8, %rdi
        movb    shift, %cl
        shrq    %cl, %rdi
        xorq    %r8, %rdi
        cmpq    %r10, %rdi
        jae     next
        shlq    $12, %rdi
        addq    %r12, %rdi

        lfence
        rdtsc
        movl    %eax, %esi
        movq    %rdx, %rbx
        lfence
        incq    (%rdi)
        lfence
        rdtsc
        shlq    $32, %rbx
        orq     %rbx, %rsi                      # before
        shlq    $32, %rdx
        orq     %rax, %rdx                      # behind
        incq    (%r14)
        movq    %rdx, 16(%r14)
        movq    %r8, 24(%r14)

        movq    %rdx, %rax
        subq    %rsi, %rax
        orq     $(1 << FIRST_OCTAVE), %rax
        movl    $0x3fffffff, %ebx
        cmpq    %rbx, %rax
        cmovaq  %rbx, %rax
        bsrq    %rax, %rcx
        leal    -BUCKET_BITS(%rcx), %ecx
        shrq    %cl, %rax                       # 16 to 31
        subl    $(FIRST_OCTAVE - BUCKET_BITS), %ecx
        shll    $BUCKET_BITS, %ecx
        leal    -(1 << BUCKET_BITS)(%rax,%rcx), %eax
        incq    (%r15,%rax,8)

        movq    %rdx, %rax
        subq    %r13, %rax
        cmpq    %rbp, %rax
        jb      next
        movq    %rdx, %r13
        movw    $0x3f8, %dx
        movb    $'B', %al
        outb    %al, %dx
        incq    8(%r14)
        jmp     next
