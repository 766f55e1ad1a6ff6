# A guest that is a disk's first sector: A once, then B for each pass over its pages, to the first byte of each of which a pass
# adds one.  Between two passes all are equal; at any moment they step down by one, once at most, along the pages.
#
#   as --32 -o b.o bootsector.S && ld -m elf_i386 -Ttext=0x7C00 --oformat binary -o bootsector.bin b.o
#
# On the serial port also: # if the firmware did not say that this is the first hard disk.
# With SUSPEND it suspends the machine after its first pass, and goes on with its passes when it is woken.

        .set    PAGES_FROM, 0x100000
        .set    MARK, 0x51454D55        # in the second word of the first page: it has suspended itself
        .set    SERIAL, 0x3F8
        .set    PM1_CONTROL, 0x604
        .set    SUSPEND, 0x2401
        .set    FIRST_HARD_DISK, 0x80

        .code16
        .globl  _start
_start: jmp     real

        .org    4
pages:  .long   256                     # patched into the image
suspend: .long  0

real:   cli
        xor     %ax, %ax
        mov     %ax, %ds
        cmp     $FIRST_HARD_DISK, %dl
        je      1f
        mov     $SERIAL, %dx
        mov     $'#', %al
        out     %al, %dx
1:      in      $0x92, %al              # address line 20
        or      $2, %al
        out     %al, $0x92
        lgdtl   gdtr
        mov     %cr0, %eax
        or      $1, %al
        mov     %eax, %cr0
        ljmpl   $8, $protected

        .code32
protected:
        mov     $16, %eax
        mov     %eax, %ds
        mov     %eax, %es
        mov     %eax, %ss
        mov     $PAGES_FROM, %ebx
        mov     $SERIAL, %edx
        cmpl    $MARK, 4(%ebx)
        je      pass
        mov     $'A', %al
        out     %al, %dx

pass:   mov     %ebx, %edi
        mov     pages, %ecx
1:      incb    (%edi)
        add     $0x1000, %edi
        loop    1b
        mov     $'B', %al
        out     %al, %dx
        cmpl    $0, suspend
        je      pass
        cmpl    $MARK, 4(%ebx)
        je      pass
        movl    $MARK, 4(%ebx)
        mov     $PM1_CONTROL, %edx
        mov     $SUSPEND, %ax
        out     %ax, %dx
1:      hlt
        jmp     1b

        .align  8
gdt:    .quad   0
        .quad   0x00CF9B000000FFFF      # code, flat
        .quad   0x00CF93000000FFFF      # data, flat
gdtr:   .word   . - gdt - 1
        .long   gdt

        .org    510
        .byte   0x55, 0xAA
